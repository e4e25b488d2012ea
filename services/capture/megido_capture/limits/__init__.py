"""How many, how large and how long: clients, heads, silences."""
