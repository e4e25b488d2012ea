"""Lists of hosts."""

from ipaddress import ip_address

import pytest

from megido_shared.hostpatterns import HostPatterns


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("bank.example", "bank.example", 443),
        ("Bank.Example.", "BANK.example", 443),
        ("bank.example", "bank.example.", 443),
        ("a.example, b.example", "b.example", 443),
        ("*.apple.com", "gsa.apple.com", 443),
        ("*.apple.com", "a.b.apple.com", 443),
        ("bank.example:8443", "bank.example", 8443),
        ("*.bank.example:8443", "www.bank.example", 8443),
        ("10.0.0.0/8", "10.1.2.3", 443),
        ("10.1.2.3:443", "10.1.2.3", 443),
        ("10.0.0.0/8", "::ffff:10.1.2.3", 443),
        ("2001:db8::/32", "2001:db8::1", 443),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("[2001:db8::1]", "[2001:db8::1]", 443),
        ("bücher.example", "xn--bcher-kva.example", 443),
        ("xn--bcher-kva.example", "bücher.example", 443),
        ("127.1", "127.0.0.1", 443),
        ("10.0.0.0/8", "[64:ff9b::a01:203]", 443),
        ("fe80::/10", "fe80::1%eth0", 443),
        ("under_score.example", "under_score.example", 443),
    ],
)
def test_on_the_list(text: str, host: str, port: int) -> None:
    assert HostPatterns(text).match([host], port)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("", "bank.example", 443),
        ("bank.example", "www.bank.example", 443),
        ("bank.example", "otherbank.example", 443),
        ("*.apple.com", "apple.com", 443),
        ("*.apple.com", "pineapple.com", 443),
        ("bank.example:8443", "bank.example", 443),
        ("10.0.0.0/8", "11.1.2.3", 443),
        ("10.0.0.0/8", "10.example", 443),
        ("10.0.0.0/8", "2001:db8::1", 443),
        ("bank.example", "", 443),
    ],
)
def test_not_on_the_list(text: str, host: str, port: int) -> None:
    assert not HostPatterns(text).match([host], port)


@pytest.mark.parametrize(
    "entry",
    ["a b", "*", "*.", "a.*.example", "ba*k.example", "^bank", "bank.example:0", "bank.example:x", "bank.example:70000",
     "10.0.0.1/8", "300.1.1.1", "2001:db8::zz", "https://bank.example", "bank..example", ".example", "bank.example/x",
     "-x.example", "fe80::/129"],
)  # fmt: skip
def test_entries_that_mean_nothing(entry: str) -> None:
    with pytest.raises(ValueError, match=r"host name|network|port"):
        HostPatterns(f"fine.example, {entry}")


def test_the_entry_is_named_as_it_was_written() -> None:
    patterns = HostPatterns("Bank.example:8443, bank.example:443, *.internal, 10.0.0.0/8:22")
    assert patterns.name("bank.example", 443) == "bank.example:443"
    assert patterns.name("bank.example", 8443) == "Bank.example:8443"
    assert patterns.name("bank.example", 80) == ""
    assert patterns.name("a.internal", 80) == "*.internal"
    assert patterns.address(ip_address("::ffff:10.1.2.3"), 22) == "10.0.0.0/8:22"
    assert patterns.address(ip_address("10.1.2.3"), 80) == ""
    assert (patterns.empty, patterns.has_networks) == (False, True)
    assert HostPatterns(" ,").empty
