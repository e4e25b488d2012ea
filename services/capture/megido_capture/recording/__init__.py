"""From hooks to events: flows, bodies, connections and failures, journaled before the client has its answer."""
