"""The addon in a running mitmproxy whose user changes options: what cannot take effect is refused."""

import atexit
from collections.abc import Iterator
from pathlib import Path

import pytest
from mitmproxy import exceptions
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.test import taddons

from megido_capture.addon import MegidoAddon


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[taddons.context, MegidoAddon]]:
    addon = MegidoAddon({"MEGIDO_DATA_DIR": str(tmp_path)}, hosted=False)
    with taddons.context(Proxyserver(), addon) as context:
        context.options.update(listen_host="127.0.0.1", megido_forwarder=False, confdir=str(tmp_path / "ca"))
        addon.begin()
        assert addon.node is not None
        yield context, addon
        atexit.unregister(addon.node.journal.close)
        addon.node.journal.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source_app", "scanner"),
        ("api_url", "http://127.0.0.1:1"),
        ("megido_node", "other"),
        ("megido_kafka", "127.0.0.1:9092"),
        ("mode", ["regular@0.0.0.0:9999"]),
        ("listen_host", "0.0.0.0"),
        ("listen_host", ""),
        ("auth_required", True),
    ],
)
def test_what_cannot_take_effect_is_refused(
    running: tuple[taddons.context, MegidoAddon], name: str, value: object
) -> None:
    context, _ = running
    before = getattr(context.options, name)
    with pytest.raises(exceptions.OptionsError):
        context.options.update(**{name: value})
    assert getattr(context.options, name) == before


def test_what_can_is_in_force_at_once(running: tuple[taddons.context, MegidoAddon]) -> None:
    context, addon = running
    assert addon.node is not None
    context.options.update(auth_required=True, auth_token="t", max_body_size=7, websocket_enabled=False)
    assert addon.node.parts.access.settings.auth_required and addon.node.parts.recorder.keep.request == 7
    assert not addon.node.parts.websockets.enabled
    context.options.update(mode=["regular@0.0.0.0:9999"])  # asks for the token
    with pytest.raises(exceptions.OptionsError, match="without authentication"):
        context.options.update(auth_required=False)


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_the_service_without_a_host_listens_on_loopback(tmp_path: Path, host: str) -> None:
    addon = MegidoAddon({"MEGIDO_DATA_DIR": str(tmp_path)}, hosted=False)
    with taddons.context(Proxyserver(), addon) as context:
        context.options.update(listen_host=host, megido_forwarder=False, confdir=str(tmp_path / "ca"))
        addon.begin()
        assert addon.node is not None
        assert context.options.listen_host == "127.0.0.1"
        atexit.unregister(addon.node.journal.close)
        addon.node.journal.close()
