"""Keeps traffic out of the service's log: mitmproxy's crash reports quote the bytes that a layer choked on."""

import logging

from megido_capture.recording.errors import plain, trace_of

MAX_LINE = 2_000
MAX_TRACE = 4_000


class Bounded(logging.Filter):
    """For handlers: messages of mitmproxy, and every stack trace, are cut and lose the bytes that they quote."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("mitmproxy"):
            record.msg, record.args = plain(record.getMessage())[:MAX_LINE], ()
        if record.exc_info and record.exc_info[1] is not None:
            # A formatter prints `exc_text` as it is.
            record.exc_text, record.exc_info = trace_of(record.exc_info[1], MAX_TRACE), None
        return True


def bound_logs() -> None:
    """Of the root logger's handlers as they are now."""
    bounded = Bounded()
    for handler in logging.getLogger().handlers:
        handler.addFilter(bounded)
