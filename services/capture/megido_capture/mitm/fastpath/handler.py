"""The handler of a client's connections: events without a lock, hooks without a task, one write for what belongs
together.

mitmproxy puts each event behind an `asyncio.Lock` because tasks that an event starts eagerly may bring the next one
while it is still being handled. Nothing else can: handling never awaits. So an event that comes meanwhile is queued
and handled next, in the order in which it would have got the lock, and every other one is handled at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

from mitmproxy import flow
from mitmproxy.connection import Connection, ConnectionState
from mitmproxy.proxy import commands, events, mode_servers
from mitmproxy.proxy.layers.http import HttpStream
from mitmproxy.proxy.server import ConnectionIO
from mitmproxy.utils import asyncio_utils

from megido_capture.mitm.fastpath import direct, endings

type Start = Callable[[str, Any], Awaitable[None] | None]
"""`Dispatcher.start`: calls the functions of a hook on its subject."""

_Original = mode_servers.ProxyConnectionHandler

_subject_fields: dict[type[commands.StartHook], str] = {}


def replace() -> None:
    """`mode_servers` makes its handlers from a name in the module."""
    mode_servers.ProxyConnectionHandler = Handler  # type: ignore[misc]


async def _nothing() -> None:
    """What the watchdog of an ended connection calls."""


class Handler(_Original):
    """As `ProxyConnectionHandler`. Hooks need no task when `master.addons` has a `start` (see `Dispatcher`)."""

    def __init__(self, master: Any, reader: Any, writer: Any, options: Any, mode: Any) -> None:
        super().__init__(master, reader, writer, options, mode)  # type: ignore[no-untyped-call]
        self._busy = False
        self._queue: deque[tuple[events.Event, asyncio.Future[None] | None]] = deque()
        self._receiver: Connection | None = None
        """To whom the pieces go that are not written yet."""
        self._pieces: list[bytes] = []
        self._told: set[Connection] = set()
        """Connections whose end was handled before their task knows of it."""
        self.dropped: list[HttpStream] = []
        """Streams that are over, until the event that ended them has been handled."""
        self.throttle = direct.Throttle()
        self._start: Start | None = getattr(master.addons, "start", None)
        self.in_place = self._start is not None
        """Whether hooks may be called where they are yielded (see `layers`)."""
        self.layer.context.handler = self  # type: ignore[attr-defined]

    def start_hook(self, hook: commands.StartHook) -> bool:
        """Calls the functions of a hook. True: it has ended. False: a task, which will say when it has."""
        self._write()  # what a function writes itself comes after it
        kind = type(hook)
        name = _subject_fields.get(kind)
        if name is None:
            (field,) = fields(hook)  # type: ignore[arg-type]
            name = _subject_fields[kind] = field.name
        subject = getattr(hook, name)
        assert self._start is not None
        pending = self._start(kind.name, subject)
        if pending is None and not (isinstance(subject, flow.Flow) and subject.intercepted):
            return True
        hook.pending = self._finish(pending, subject)  # type: ignore[attr-defined]
        return False

    async def _finish(self, pending: Awaitable[None] | None, subject: Any) -> None:
        with self.timeout_watchdog.disarm():
            if pending is not None:
                await pending
            if isinstance(subject, flow.Flow):
                await subject.wait_for_resume()

    async def handle_hook(self, hook: commands.StartHook) -> None:
        pending: Awaitable[None] | None = getattr(hook, "pending", None)
        if pending is None:
            await super().handle_hook(hook)
        else:
            hook.pending = None  # type: ignore[attr-defined]
            await pending

    async def handle_client(self) -> None:
        await super().handle_client()
        # Not now: tasks that were cancelled last have a turn to come.
        asyncio.get_running_loop().call_soon(self._dissolve)

    def _dissolve(self) -> None:
        top, context = self.layer, self.layer.context
        self.layer = endings.Ended(context)  # type: ignore[assignment]
        context.handler = None  # type: ignore[attr-defined]
        endings.take_apart(top)
        self.timeout_watchdog.callback = _nothing

    async def handle_connection(self, connection: Connection) -> None:
        reader = direct.take_over(self, connection)
        try:
            await super().handle_connection(connection)
        except asyncio.CancelledError as cancelled:
            # mitmproxy's frame keeps the exception, whose traceback keeps the frame, and all that it holds.
            raise cancelled.with_traceback(None) from None
        finally:
            if reader is not None:
                reader.release()

    async def server_event(self, event: events.Event) -> None:
        """Returns when the event has been handled."""
        if self._told and type(event) is events.ConnectionClosed and event.connection in self._told:
            self._told.discard(event.connection)
            return
        if not self._busy:
            self.handle(event)
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((event, turn))
        await turn

    def closed_by_peer(self, connection: Connection) -> None:
        """What `handle_connection` does at the end of a stream, ahead of its task, which will tell it again."""
        connection.state &= ~ConnectionState.CAN_READ
        self._told.add(connection)
        self.handle(events.ConnectionClosed(connection))

    def handle(self, event: events.Event) -> None:
        """Handles an event now, or right after the one that is being handled."""
        queue = self._queue
        if self._busy:
            queue.append((event, None))
            return
        self._busy = True
        try:
            self._handle(event)
            while queue:
                event, turn = queue.popleft()
                self._handle(event)
                if turn is not None and not turn.done():
                    turn.set_result(None)
        finally:
            self._busy = False
            if self.dropped:
                endings.empty(self.dropped)

    def _handle(self, event: events.Event) -> None:
        self.timeout_watchdog.register_activity()
        try:
            try:
                for command in self.layer.handle_event(event):
                    if type(command) is commands.SendData:
                        connection = command.connection
                        if connection is not self._receiver:
                            self._write()
                            self._receiver = connection
                        self._pieces.append(command.data)
                    else:
                        self._obey(command)
            finally:
                self._write()  # also what came before a crash
        except Exception:  # noqa: BLE001 - as in mitmproxy: logged, and the connection goes on
            self.log("mitmproxy has crashed!", logging.ERROR, exc_info=True)

    def _write(self) -> None:
        pieces, connection = self._pieces, self._receiver
        if connection is None:
            return
        self._pieces, self._receiver = [], None
        io = self.transports.get(connection)
        # None: closed already.
        if io is not None and io.writer is not None and not io.writer.is_closing():
            io.writer.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _obey(self, command: commands.Command) -> None:
        """Everything but `SendData`, as `ConnectionHandler.server_event` does it."""
        self._write()
        if isinstance(command, commands.OpenConnection):
            assert command.connection not in self.transports
            handler = self._task(
                self.open_connection(command), f"server connection handler {command.connection.address}"
            )
            self.transports[command.connection] = ConnectionIO(handler=handler)
        elif isinstance(command, commands.RequestWakeup):
            self.wakeup_timer.add(self._task(self.wakeup(command), f"wakeup timer ({command.delay:.1f}s)"))
        elif isinstance(command, commands.ConnectionCommand) and command.connection not in self.transports:
            pass  # closed already
        elif isinstance(command, commands.CloseTcpConnection):
            self.close_connection(command.connection, command.half_close)
        elif isinstance(command, commands.CloseConnection):
            self.close_connection(command.connection, False)
        elif isinstance(command, commands.StartHook):
            if self._start is not None and getattr(command, "pending", None) is None and self.start_hook(command):
                self._queue.append((events.HookCompleted(command), None))
            else:
                self._task(self.hook_task(command), f"handle_hook({command.name})", keep_ref=True)
        elif isinstance(command, commands.Log):
            self.log(command.message, command.level)
        else:
            raise RuntimeError(f"Unexpected command: {command}")

    def _task(self, coroutine: Any, name: str, *, keep_ref: bool = False) -> asyncio.Task[None]:
        return asyncio_utils.create_task(coroutine, name=name, keep_ref=keep_ref, client=self.client.peername)
