"""Static assets by the rules of RFC 9111."""
