"""WebSocket connections: what is recorded of them, and what is put into mitmproxy's relay so that it can be."""

from megido_capture.websocket.install import observe, stop_observing
from megido_capture.websocket.recording import WebSockets

__all__ = ["WebSockets", "observe", "stop_observing"]
