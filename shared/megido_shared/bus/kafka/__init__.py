"""The bus on Apache Kafka. The only package that knows the Kafka client."""

from megido_shared.bus.kafka.bus import KafkaBus

__all__ = ["KafkaBus"]
