"""The command line of `megido capture`: a flag for each option, made from the settings. A flag that is not given
leaves no attribute behind, so that what was given is known."""

import argparse
from typing import Any

from megido_capture.configuration.settings import JOURNAL_POLICIES, NAMES, CaptureSettings
from megido_shared.settings import METRICS_PORTS

METRICS_PORT = METRICS_PORTS["capture"]
MAX_WORKERS = 64
"""More than a machine has use for: each takes about 100 MB."""
_METAVAR = {"api_url": "URL", "journal_cap": "SIZE"}
_CHOICES = {"journal_policy": JOURNAL_POLICIES}
_PLACE = {
    "data_dir": "megido_data_dir",
    "kafka": "megido_kafka",
    "node_name": "megido_node",
    "forwarder": "megido_forwarder",
    "protect": "megido_protect",
}


def parser(help_of: dict[str, str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="megido capture", description="Proxy HTTP, HTTPS and WebSocket traffic and record it in the journal."
    )
    made.add_argument("--listen-host", default="127.0.0.1", help="Address to listen on. Default: %(default)s.")
    made.add_argument(
        "--listen-port", type=int, default=8080, help="Port to listen on; 0 picks a free one. Default: %(default)s."
    )
    made.add_argument(
        "--mode", action="append", help="mitmproxy's mode: regular, upstream:URL, reverse:URL, socks5, ... Repeatable."
    )
    made.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="Processes that share the port. Default: %(default)s."
    )
    for name in NAMES:
        _add_option(made, name, help_of[name])
    made.add_argument("--ssl-insecure", action="store_true", help="Do not verify the certificates of servers.")
    made.add_argument("--data-dir", default="", help="Data directory. Default: MEGIDO_DATA_DIR or the XDG data home.")
    made.add_argument("--kafka", default="", metavar="HOST:PORT", help="Kafka; none: the local bus.")
    made.add_argument("--node-name", default="capture", help="Name of the node's slot in the data directory.")
    made.add_argument(
        "--forwarder", action=argparse.BooleanOptionalAction, default=True, help="Ship the journal by a child process."
    )
    made.add_argument(
        "--protect",
        action=_Joined,
        default="",
        metavar="HOST:PORT",
        help="Megido's own endpoint that nobody reaches through the proxy. Repeatable; beside those that it knows.",
    )
    made.add_argument(
        "--fastpath", action=argparse.BooleanOptionalAction, default=True, help="Replace mitmproxy's hot spots."
    )
    made.add_argument(
        "--metrics-port",
        type=int,
        default=METRICS_PORT,
        help="Port of /livez, /readyz and /metrics on loopback; 0 picks a free one. Default: %(default)s.",
    )
    made.add_argument(
        "--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help="Any option of mitmproxy."
    )
    return made


class _Joined(argparse.Action):
    """Given several times, one list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def _workers(text: str) -> int:
    """Raises ValueError, of which argparse says "invalid _workers value", or its own error, which says more."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MAX_WORKERS}")
    return int(text)


def _add_option(made: argparse.ArgumentParser, name: str, text: str) -> None:
    default = getattr(CaptureSettings(), name)
    kind = type(default)
    shown = {True: "on", False: "off"}.get(default, default) if kind is bool else default
    flag = "--" + name.replace("_", "-")
    text = (text if shown == "" else f"{text} Default: {shown}.").replace("%", "%%")
    if kind is bool:
        made.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    else:
        made.add_argument(
            flag,
            type=kind,
            default=argparse.SUPPRESS,
            help=text,
            metavar=None if name in _CHOICES else _METAVAR.get(name, "N" if kind is int else "TEXT"),
            choices=_CHOICES.get(name),
        )


def options_of(arguments: argparse.Namespace, modes: list[str]) -> dict[str, Any]:
    """mitmproxy's and our options, by name: what was given, and what says where the proxy runs."""
    found = {
        "listen_host": arguments.listen_host,
        "listen_port": arguments.listen_port,
        "mode": modes,
        "ssl_insecure": arguments.ssl_insecure,
    }
    found |= {option: getattr(arguments, flag) for flag, option in _PLACE.items()}
    return found | {name: value for name, value in vars(arguments).items() if name in NAMES}
