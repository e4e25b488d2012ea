"""Retention: what is older or larger than the policy allows goes, oldest first. Run by the leader."""

from megido_ingest.retention.keeper import Keeper, RetentionMetrics
from megido_ingest.retention.runs import Places, Retention

__all__ = ["Keeper", "Places", "Retention", "RetentionMetrics"]
