"""Charsets that bodies of strangers may be decoded in.

Not every codec of Python: some are no charsets, and some (punycode) take quadratic time, hours for what fits into a
message.
"""

import codecs

_KNOWN = frozenset({
    "ascii", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be",
    *(f"iso8859-{part}" for part in range(1, 17) if part != 12),
    *(f"cp{page}" for page in (437, 850, 852, 855, 866, 874, 932, 949, 950, *range(1250, 1259))),
    "shift_jis", "euc_jp", "iso2022_jp", "euc_kr", "iso2022_kr", "gb2312", "gbk", "gb18030", "big5", "big5hkscs",
    "koi8-r", "koi8-u", "tis-620", "mac-roman", "mac-cyrillic",
})  # fmt: skip


def decode(data: bytes, charset: str) -> str:
    """Raises LookupError on a charset that is not known here, UnicodeDecodeError on bytes that are not in it."""
    try:
        name = codecs.lookup(charset).name
    except ValueError as error:  # a NUL in the name
        raise LookupError(charset) from error
    if name not in _KNOWN:
        raise LookupError(charset)
    return data.decode(name)
