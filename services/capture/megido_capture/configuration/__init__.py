"""What a node goes by: its start, the live configuration over it, and the copy of the last good one."""
