"""Batches of events from HTTP forwarders: capture on a machine without a bus."""
