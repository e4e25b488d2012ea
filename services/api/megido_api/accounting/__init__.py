"""Accounting: what became of everything that each node captured."""
