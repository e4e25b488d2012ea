"""Payload rules on bodies whose length nobody knows before their end: held back up to a cap, changed, and sent on."""

from collections.abc import Callable, Iterable

from mitmproxy import http

from megido_capture.counters import Counters, contained
from megido_capture.recording.flows import content_length
from megido_capture.recording.state import FlowState, Registry
from megido_capture.recording.tee import Stream
from megido_capture.rules.heads import RuleSet
from megido_capture.rules.injection import BODY_CAP


class Rewriting:
    """A `stream` callable for mitmproxy that gives `inner` the changed body at once, when its end has come; or, once
    it is larger than `BODY_CAP`, what has come so far and everything after that, unchanged."""

    def __init__(
        self, change: Callable[[bytes], bytes], inner: Stream, *, skip: Callable[[], None], cap: int = BODY_CAP
    ) -> None:
        self._change = change
        self._inner = inner
        self._skip = skip
        self._cap = cap
        self._held: list[bytes] = []
        self._size = 0
        self._passing = False

    def __call__(self, data: bytes) -> Iterable[bytes] | bytes:
        """`data` is b"" at the body's end (mitmproxy's convention)."""
        if self._passing:
            return self._inner(data)
        if not data:
            self._passing = True
            changed = self._change(self._released())
            return [*_pieces(self._inner(changed) if changed else ()), *_pieces(self._inner(b""))]
        self._held.append(data)
        self._size += len(data)
        if self._size <= self._cap:
            return ()
        self._passing = True
        self._skip()
        return self._inner(self._released())

    def _released(self) -> bytes:
        body, self._held = b"".join(self._held), []
        return body


def _pieces(found: Iterable[bytes] | bytes) -> list[bytes]:
    """Without empty ones: in chunked coding they would end the body."""
    return [piece for piece in ([found] if isinstance(found, bytes) else found) if piece]


class StreamedRules:
    """Behind the addon that streams: its tee records what is sent."""

    name = "megido-streamed-rules"

    def __init__(self, rules: RuleSet, registry: Registry, counters: Counters) -> None:
        self.counters = counters
        self._rules = rules
        self._registry = registry

    @property
    def idle_hooks(self) -> frozenset[str]:
        """See `Dispatcher`."""
        return frozenset() if self._rules else frozenset(("requestheaders",))

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        stream = flow.request.stream
        state = self._registry.flows.get(flow.id) if callable(stream) else None
        if state is None or not callable(stream) or content_length(flow.request.headers) is not None:
            return
        if self._rules.wants_body(flow.request):
            flow.request.stream = Rewriting(
                lambda body: self._changed(flow.request, state, body),
                stream,
                skip=lambda: self._rules.skip_body(flow.request),
            )

    def _changed(self, request: http.Request, state: FlowState, body: bytes) -> bytes:
        try:
            changed, applied = self._rules.apply_to(request, body)
        except Exception as error:  # noqa: BLE001 - the body must go on whatever happens to the rules
            self.counters.hook_failed("streamed_rules", error)
            return body
        state.rules += applied
        return changed
