"""Who may use the proxy, and what nobody reaches through it."""
