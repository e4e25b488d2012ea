"""`megido up`: every service on one machine, over the local bus and an embedded Postgres."""
