"""The libraries whose private parts are replaced here, and the versions with which that was tested."""

from importlib.metadata import version

from megido_shared.errors import ConfigurationError

TESTED = {
    "mitmproxy": ("12.2", "12.3"),
    "h11": ("0.16",),
    "h2": ("4.4",),
    "wsproto": ("1.3",),
}
"""Major and minor version by distribution. pyproject.toml has the same as bounds, so an installer keeps to them; a
unit test compares."""


def require_tested() -> None:
    """Raises ConfigurationError, with what to install, unless all of them are versions that were tested with.

    To be called before anything is put into mitmproxy. A node does not run without its replacements: bounds on heads,
    messages and bodies, and what keeps a request from being smuggled, are among them.
    """
    for name, tested in TESTED.items():
        found = version(name)
        if ".".join(found.split(".")[:2]) not in tested:
            raise ConfigurationError(
                f"{name} {found} is installed, and Megido guards its private parts: it was tested with "
                f"{' and '.join(f'{known}.x' for known in tested)}; install one of those, best from requirements.lock"
            )
