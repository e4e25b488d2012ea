"""WebSocket messages: the list, and what older capture tools post."""
