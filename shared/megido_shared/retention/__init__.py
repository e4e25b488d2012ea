"""What is kept for how long, and what a run of retention says. For ingest, which does it, and for the API."""

from megido_shared.retention.policy import FIELDS, NOTHING, Policy, check, read_policy
from megido_shared.retention.report import Bus, Day, Logs, Report

__all__ = ["FIELDS", "NOTHING", "Bus", "Day", "Logs", "Policy", "Report", "check", "read_policy"]
