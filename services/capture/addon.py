"""For `mitmdump -s services/capture/addon.py` (and mitmproxy, mitmweb). Everything is in `megido_capture`.

mitmproxy loads this file under a name of its own and leaves no trace of its folder on the path, so this stays
a shim; in a checkout that is not installed it finds the packages beside it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
for _package, _folder in (("megido_capture", _HERE), ("megido_shared", _HERE.parents[1] / "shared")):
    if find_spec(_package) is None:
        sys.path.append(str(_folder))

from megido_capture.addon import MegidoAddon  # noqa: E402

addons = [MegidoAddon()]
