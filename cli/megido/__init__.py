"""The `megido` command, the launcher and the Python client."""
