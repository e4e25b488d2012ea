"""JSON log files: their newest entries, and clean-up by age."""
