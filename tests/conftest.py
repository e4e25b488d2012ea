"""Fixtures live in `tests/fixtures`, one module a concern."""

pytest_plugins = ["tests.fixtures.postgres", "tests.fixtures.kafka"]
