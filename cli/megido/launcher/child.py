"""A service as a child of the launcher: `python -m megido.launcher.child PARENT MODULE …`.

It ends with its parent, also when that is killed with -9: by itself with SIGTERM, and if that does not end it, by
SIGKILL.
"""

import importlib
import os
import select
import signal
import sys
import threading

_GRACE_SECONDS = 18.0


def main(arguments: list[str]) -> int:
    parent, module, *rest = arguments
    _follow(int(parent))
    code: int = importlib.import_module(module).main(rest)
    return code


def _follow(parent: int) -> None:
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        sys.exit(1)
    if os.getppid() != parent:
        sys.exit(1)
    threading.Thread(target=_end_after, args=(watched,), name="launcher", daemon=True).start()


def _end_after(watched: int) -> None:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
