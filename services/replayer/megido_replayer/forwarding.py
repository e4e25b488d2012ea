"""With Kafka: the child process that ships this data directory's journals, kept running while we run."""

import asyncio
import contextlib
import ctypes
import logging
import signal
import sys

from megido_shared.settings import Common

_RESTART_AFTER_S = 5.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


async def forward(common: Common) -> None:
    """Runs the forwarder until cancelled, and starts it again when it dies. Several on one data directory share
    its files, so it does no harm beside another service's."""
    command = [sys.executable, "-m", "megido_shared.bus.forwarder", "--data-dir", str(common.data_dir.root)]
    while True:
        child = await asyncio.create_subprocess_exec(
            *command,
            "--kafka",
            common.kafka,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # kill -9 of ours ends it too; a new start brings its own
        )
        try:
            code = await child.wait()
        except asyncio.CancelledError:
            await _end(child)
            raise
        _log.warning("the forwarder ended with code %s and is started again", code)
        await asyncio.sleep(_RESTART_AFTER_S)


async def _end(child: asyncio.subprocess.Process, patience_s: float = 2.0) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), patience_s)
        except TimeoutError:
            child.kill()
            await child.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
