"""What the services have in common: events, identity, the bus, the database, settings."""
