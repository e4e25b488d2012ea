"""Servers and waits that tests share."""
