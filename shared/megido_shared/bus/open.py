"""Which bus a service uses."""

import os
from collections.abc import Mapping

from megido_shared.bus.base import Bus
from megido_shared.bus.local import LocalBus
from megido_shared.errors import ConfigurationError
from megido_shared.settings import Common


def open_bus(common: Common, env: Mapping[str, str] = os.environ) -> Bus:
    """Kafka if it is configured (with MEGIDO_KAFKA_* for its security and the prefix of its names), else the local bus
    of the data directory.

    Does not connect. Raises ConfigurationError."""
    if not common.kafka:
        return LocalBus(common.data_dir)
    # Services on the local bus start without the Kafka client, which may not be installed.
    try:
        from megido_shared.bus.kafka import KafkaBus  # noqa: PLC0415
        from megido_shared.bus.kafka.client import security_from_env  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError("Kafka needs the extra `kafka`: pip install 'megido[kafka]'") from error
    return KafkaBus(common.kafka, security=security_from_env(env), prefix=env.get("MEGIDO_KAFKA_PREFIX", ""))
