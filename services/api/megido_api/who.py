"""Who makes a change, for the audit."""

from fastapi import Request


def who(request: Request) -> str:
    """`token` when a bearer token was sent (one that is wrong does not come so far), and the client's address. Names
    come with users."""
    address = request.client.host if request.client else "unknown"
    return f"token, {address}" if request.headers.get("authorization") else address
