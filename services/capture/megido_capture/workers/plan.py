"""What the parent settles before the first worker starts."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from megido_capture import authority
from megido_capture.configuration.settings import CaptureSettings, defaults_from_env
from megido_capture.workers.group import Plan
from megido_capture.workers.worker import Share
from megido_shared.bus.forwarder_child import ForwarderChild
from megido_shared.errors import ConfigurationError
from megido_shared.settings import common_from_env

_FLAGS = {
    "listen_host": "--listen-host",
    "listen_port": "--listen-port",
    "mode": "--mode",
    "api_url": "--api-url",
    "megido_data_dir": "--data-dir",
    "megido_kafka": "--kafka",
    "megido_node": "--node-name",
    "megido_forwarder": "--forwarder",
}
"""Options that the parent has to know itself; as `--set` only the workers would see them."""


def planned(share: Share, argv: list[str], arguments: argparse.Namespace, env: Mapping[str, str]) -> Plan:
    """Makes the certificate authority and checks the data directory. Raises ConfigurationError."""
    options = dict(_option(given) for given in arguments.options)
    if beside := sorted(options.keys() & _FLAGS):
        raise ConfigurationError(f"--set {beside[0]} does not go with --workers; use {_FLAGS[beside[0]]}")
    common = common_from_env(env, data_dir=arguments.data_dir, kafka=arguments.kafka)
    common.data_dir.ensure()
    given = options.get("confdir")
    # Workers of one group would make it at the same time, each its own.
    authority.ensure(Path(given).expanduser() if given else common.data_dir.ca)
    forwarder = None
    if arguments.forwarder:
        url = getattr(arguments, "api_url", None) or CaptureSettings(**defaults_from_env(env)).api_url
        forwarder = ForwarderChild(common.data_dir, kafka=common.kafka, api_url=url)
    return Plan(share, argv, env, forwarder)


def _option(given: str) -> tuple[str, str]:
    name, _, value = given.partition("=")
    return name.strip(), value
