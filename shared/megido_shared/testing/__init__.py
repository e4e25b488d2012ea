"""Builders and fakes for tests: of this project and of those who extend it."""

from megido_shared.testing.builders import a_completed_flow, a_request, a_response
from megido_shared.testing.clock import FakeClock

__all__ = ["FakeClock", "a_completed_flow", "a_request", "a_response"]
