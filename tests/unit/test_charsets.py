"""Which charsets bodies are decoded in."""

import codecs

import pytest

from megido_shared import charsets


@pytest.mark.parametrize("name", sorted(charsets._KNOWN))
def test_known_ones_go_by_the_name_that_python_gives_them(name: str) -> None:
    assert codecs.lookup(name).name == name


@pytest.mark.parametrize(
    ("name", "raw"),
    [("latin1", b"\xe9"), ("Windows-1252", b"\xe9"), ("UTF8", b"\xc3\xa9"), ("macintosh", b"\x8e")],
)
def test_aliases(name: str, raw: bytes) -> None:
    assert charsets.decode(raw, name) == "é"


@pytest.mark.parametrize("name", ["punycode", "idna", "unicode_escape", "utf-7", "rot13", "hex", "undefined", "\0", ""])
def test_others_are_none(name: str) -> None:
    with pytest.raises(LookupError):
        charsets.decode(b"a", name)
