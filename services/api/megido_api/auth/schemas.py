"""Shapes of authentication attempts."""

from pydantic import BaseModel

from megido_api.fields import Name, Text, TimeUs


class PostedAttempt(BaseModel):
    """One decision on a client's credentials. There is no field for a secret."""

    source_ip: Name
    username: Text | None = ""
    success: bool = False
    failure_reason: Text | None = ""
    timestamp: TimeUs = None
