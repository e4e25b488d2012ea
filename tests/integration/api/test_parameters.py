"""A filter that a list does not know is an error that names it, never the whole list."""

import pytest

from tests.integration.api.harness import Api


@pytest.mark.parametrize("path", ["requests", "websocket-messages/list", "errors/list"])
@pytest.mark.parametrize("name", ["filter", "source_app", "Method", "a%00b"])
async def test_an_unknown_parameter_is_refused(api: Api, path: str, name: str) -> None:
    found = await api.get(f"/proxy/api/{path}/?limit=5&{name}=x", status=400)
    assert found["error"]["code"] == "invalid"
    assert "limit" in found["error"]["message"]
