"""Query parameters that a list does not know are refused: a filter that is ignored would answer everything."""

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from megido_api.problems import bad_field


async def _only_known(request: Request) -> None:
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = {parameter.alias for parameter in route.dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise bad_field(name[:100], f"is no parameter of this list; it knows {', '.join(sorted(known))}")


ONLY_KNOWN = [Depends(_only_known)]
"""For the `dependencies` of a list's route."""
