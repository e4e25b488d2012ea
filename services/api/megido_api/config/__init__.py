"""The configuration of running proxies: read, changed field by field, audited."""
