"""Payload rules: which apply to a request, and what they change."""
