"""Which addresses replays may reach, as tables, with real name resolution of what needs none outside."""

import ipaddress

import pytest

from megido_replayer.addresses import Endpoint, Gate, Refused, Unresolved, forbidden, parse_endpoints


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("text", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "1.1.1.1"])
def test_public_addresses_are_allowed(text, allow):
    assert forbidden(ipaddress.ip_address(text), allow_loopback=allow) is None


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.9.9.9", "::1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "fd00::1", "100.64.0.1", "198.18.0.1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::",
    ],
)  # fmt: skip
def test_loopback_and_private_only_when_allowed(text):
    assert forbidden(ipaddress.ip_address(text), allow_loopback=True) is None
    assert "allowed only" in (forbidden(ipaddress.ip_address(text), allow_loopback=False) or "")


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254", "169.254.0.1", "fe80::1", "fd00:ec2::254", "168.63.129.16", "100.100.100.200", "192.0.0.192",
        "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1", "::ffff:169.254.169.254",
        "::ffff:0.0.0.0", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "::169.254.169.254",
    ],
)  # fmt: skip
def test_never_allowed(text, allow):
    assert forbidden(ipaddress.ip_address(text), allow_loopback=allow) is not None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "LOCALHOST.", "::1"])
async def test_every_spelling_of_loopback_is_seen(host):
    gate = Gate()
    with pytest.raises(Refused, match="loopback addresses are allowed only"):
        await gate.admit(host, 3000, allow_loopback=False)
    admitted = await gate.admit(host, 3000, allow_loopback=True)
    assert set(admitted) <= {"127.0.0.1", "::1"}
    assert admitted


@pytest.mark.parametrize(
    "host", ["metadata.google.internal", "Metadata.Google.Internal.", "169.254.169.254", "2852039166"]
)
async def test_metadata_by_name_and_by_number(host):
    with pytest.raises(Refused):
        await Gate().admit(host, 80, allow_loopback=True)


@pytest.mark.parametrize("own", ["127.0.0.1", "localhost", "0.0.0.0", "::", "::1"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1", "127.1"])
async def test_own_ports_by_every_address_of_this_machine(own, host):
    gate = Gate([Endpoint(own, 8000)])
    with pytest.raises(Refused, match="Megido's own"):
        await gate.admit(host, 8000, allow_loopback=True)
    assert await gate.admit(host, 8001, allow_loopback=True)


async def test_own_ports_elsewhere_by_name_and_address():
    gate = Gate([Endpoint("kafka.internal.example", 9092), Endpoint("192.0.2.7", 5432)])
    with pytest.raises(Refused, match="Megido's own"):  # the name is not even resolved
        await gate.admit("Kafka.Internal.Example.", 9092, allow_loopback=True)
    with pytest.raises(Refused, match="Megido's own"):
        await gate.admit("::ffff:192.0.2.7", 5432, allow_loopback=True)
    assert await gate.admit("192.0.2.8", 5432, allow_loopback=True) == ("192.0.2.8",)
    assert await gate.admit("127.0.0.1", 5432, allow_loopback=True) == ("127.0.0.1",)


async def test_a_name_without_an_address():
    with pytest.raises(Unresolved, match=r"nowhere\.invalid"):
        await Gate().admit("nowhere.invalid", 80, allow_loopback=True)


def test_endpoints_as_they_are_written():
    assert parse_endpoints("localhost:8000, [::1]:9092,:5432,") == [
        Endpoint("localhost", 8000),
        Endpoint("::1", 9092),
        Endpoint("localhost", 5432),
    ]
    for bad in ("localhost", "h:0", "h:99999", "h:x"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_endpoints(bad)
