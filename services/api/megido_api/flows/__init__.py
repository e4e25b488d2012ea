"""Requests with their responses: lists, details, bodies, and what older capture tools post."""
