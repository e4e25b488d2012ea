"""`megido capture --workers N`: several processes that share the proxy's port, one node each."""
