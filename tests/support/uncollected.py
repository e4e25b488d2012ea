"""`megido capture` whose garbage collector never runs. On SIGUSR1 it prints, as a line of JSON, how many objects of
the types that a connection or an exchange is made of there are."""

import gc
import json
import os
import signal
import sys
from collections import Counter
from typing import Any

from megido_capture.__main__ import main

COUNTED = frozenset(
    ("Handler", "HTTPFlow", "HttpStream", "HttpLayer", "Http2Server", "ClientTLSLayer", "ServerTLSLayer", "Reader")
)


def tell(*_: Any) -> None:
    found = Counter(name for item in gc.get_objects() if (name := type(item).__name__) in COUNTED)
    # Not by sys.stdout: whoever has read the line may ask again while it is still being flushed, which it refuses.
    os.write(1, json.dumps({"left": found}).encode() + b"\n")


if __name__ == "__main__":
    gc.set_threshold = lambda *_: gc.disable()
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main())
