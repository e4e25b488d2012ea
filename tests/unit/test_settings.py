"""Sizes as people write them."""

import pytest

from megido_shared.errors import ConfigurationError
from megido_shared.settings import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("2 TB", 2 << 40),
        (" 64KiB ", 64 << 10),
        ("100b", 100),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("journal_cap", text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5GiB", "4X", "4 GiB/s", "0x10", "٣"])
def test_what_is_no_size_is_refused_with_the_settings_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"journal_cap is .*like 512MiB"):
        parse_size("journal_cap", text)


def test_a_size_below_the_least_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="1048576 bytes at least"):
        parse_size("journal_cap", "1000KiB", 1 << 20)
