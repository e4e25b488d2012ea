"""A durable local log: each producer's journal, and the bus of the processes that share a data directory."""

from megido_shared.bus.local.bus import LocalBus
from megido_shared.bus.local.groups import follow, group_is_live
from megido_shared.bus.local.journal import Journal
from megido_shared.bus.local.room import Room

__all__ = ["Journal", "LocalBus", "Room", "follow", "group_is_live"]
