"""The shape of an HTTP/1 request head, where readers of a head could disagree about where its lines or fields end."""

from h11._receivebuffer import ReceiveBuffer, blank_line_regex

_BARE = "a line that does not end in CR LF, or a CR within one"


def head_flaw(buf: ReceiveBuffer) -> str:
    """Why the whole head at the start of the buffer must not be forwarded; empty when nothing is wrong with it, or it
    is not whole yet. RFC 9112: 2.2 allows a bare LF to be refused and forbids a bare CR, 5.2 lets folded fields be
    refused; mitmproxy takes all of them, and forwards the last two as they are."""
    data = buf._data
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return _BARE if blank_line_regex.search(data, buf._multiple_lines_search) else ""
    end += 4
    lines = data.count(b"\n", 0, end)
    if data.count(b"\r\n", 0, end) != lines or data.count(b"\r", 0, end) != lines:
        return _BARE
    if data.find(b"\n ", 0, end) >= 0 or data.find(b"\n\t", 0, end) >= 0:
        return "a folded field"
    return ""
