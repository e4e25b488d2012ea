"""The bus contract. `local` and `kafka` implement it; one contract suite (`tests/contract`) runs on both.

A *stream* is one ordered log: a Kafka partition, or what one local producer wrote on one topic. Delivery is at
least once and in order within a stream; consumers dedupe by event identity. An offset says where a record
begins and is meaningful only within its stream: consecutive on Kafka, a byte position on the local bus, so
`next_offset`, never `offset + 1`, is where reading goes on.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megido_shared.bus.topics import Topic


@dataclass(frozen=True, slots=True, order=True)
class Stream:
    """`source_id` is the Kafka cluster's id, or the epoch (hex) of the local producer; it is part of the
    identity so that a recreated Kafka or a new data directory never meets another log's offsets."""

    source_id: str
    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to publish. `value` is an encoded event; `headers` are CloudEvents attributes (Kafka keeps them,
    the local bus need not: they follow from the value)."""

    topic: str
    key: bytes
    value: bytes
    headers: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    stream: Stream
    offset: int
    next_offset: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """Records that a consumer can never have. `count` is 0 when their number cannot be known.

    corrupt: a checksum failed, the record was skipped. torn: a writer died inside an append (nobody was told
    that it succeeded). expired: retention removed what was still needed, reading goes on at the low watermark.
    rewound: the stored position belongs to another log, reading starts over and identity dedupes.
    """

    stream: Stream
    offset: int
    next_offset: int
    kind: Literal["corrupt", "torn", "expired", "rewound"]
    count: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll returned, in order within each stream. Empty when the timeout passed."""

    records: Sequence[Record] = ()
    gaps: Sequence[Gap] = ()

    def __bool__(self) -> bool:
        return bool(self.records or self.gaps)

    def positions(self) -> dict[Stream, int]:
        """Where each stream goes on after this batch."""
        ends: dict[Stream, int] = {}
        items: list[Record | Gap] = [*self.records, *self.gaps]
        for item in items:
            ends[item.stream] = max(item.next_offset, ends.get(item.stream, 0))
        return ends


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader stands: the next offset, and the id of the last event before it (b"" to skip the check)."""

    offset: int
    last_event_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a stream holds behind an offset. `behind` is in records on Kafka, in bytes on the local bus."""

    behind: int
    counted: int | None = 0
    """Records that accounting counts (seq > 0); None when they were not looked at, or cannot be told."""
    last_seq: int = 0
    """The highest among them."""


BEHIND_A_FAILURE = "an append before this one failed"

type Resume = Callable[[Collection[Stream]], Awaitable[Mapping[Stream, Position]]]
"""Asked on every assignment where to read on; a stream left out starts at the group's committed offset, or else
at the earliest record. Lets a database, not the bus, be the truth about how far a consumer is."""

type Revoked = Callable[[Collection[Stream]], Awaitable[None]]


class Producer(Protocol):
    async def append(self, records: Sequence[Outgoing]) -> None:
        """Returns only after every record is durable: a kill -9 of this process loses none of them.

        Raises Unavailable when that did not happen within the producer's deadline; some may have been written
        all the same. Order is kept within a key.
        """

    async def close(self) -> None:
        """Gives up after a deadline; never hangs on a broker that is away."""


class Consumer(Protocol):
    """One member of a consumer group. A stream is read by one live member of a group at a time."""

    async def poll(self, *, max_records: int = 2000, max_bytes: int = 8 << 20, timeout: float = 1.0) -> Batch:
        """Whatever is there, at once, up to the limits (one record at least, whatever its size); waits at most
        `timeout` seconds when nothing is. Raises Unavailable when the bus cannot be reached."""

    async def commit(self, positions: Mapping[Stream, int]) -> None:
        """Records how far the group is. Advisory where `resume` is given. Positions of streams that have been
        taken away in the meantime are ignored."""

    def assigned(self) -> frozenset[Stream]:
        """The streams that this member reads now."""

    async def lag(self) -> Mapping[Stream, int]:
        """How far each assigned stream is behind its end: records on Kafka, bytes on the local bus."""

    async def close(self) -> None:
        """Leaves the group; another member may take the streams at once."""


class Bus(Protocol):
    async def create_topics(self, topics: Sequence[Topic]) -> list[str]:
        """Creates those that do not exist and returns their names. Raises Unavailable, ConfigurationError."""

    async def topics(self) -> frozenset[str]:
        """The names of the topics that exist."""

    async def producer(self, name: str, *, ordered: bool = False) -> Producer:
        """`name` is the producer's: on the local bus the slot `<name>-<n>` that it holds until closed.

        With `ordered`, appends may overlap and are stored in the order of the calls; once one has failed all others
        fail, for ever: who makes another producer and begins again with the failed one keeps the order."""

    async def consumer(
        self,
        group: str,
        topics: Sequence[Topic],
        *,
        resume: Resume | None = None,
        revoked: Revoked | None = None,
        pins: bool = False,
    ) -> Consumer:
        """Joins a group. With `pins` the local bus frees no record before this group has committed past it."""

    async def put_config(self, scope: str, value: bytes) -> None:
        """Replaces the one current value of a scope (`global`, `app:<source_app>`, `node:<id>`)."""

    async def get_config(self, scope: str) -> bytes | None:
        """The current value, or None."""

    async def get_configs(self) -> Mapping[str, bytes]:
        """The current value of every scope that has one, read at once."""

    def watch_config(self, scopes: Collection[str]) -> AsyncIterator[tuple[str, bytes]]:
        """First the current value of each scope that has one, then every later value as it comes. A value that
        was replaced before it was read may be skipped."""

    async def backlog(self, positions: Mapping[Stream, int], *, read_bytes: int) -> Mapping[Stream, Backlog]:
        """What every stream of the topics that ingest stores holds behind a position (none: behind its beginning).
        Looks into the records, up to `read_bytes` in all, where that can be done. Raises Unavailable."""

    async def ping(self) -> None:
        """Returns when the bus can be used now; raises Unavailable with the reason."""

    async def close(self) -> None: ...
