"""`python -m megido`."""

import sys

from megido.main import main

if __name__ == "__main__":
    sys.exit(main())
