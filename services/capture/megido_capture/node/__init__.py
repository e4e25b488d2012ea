"""One capture node: `parts` puts it together, `inforce` changes what it works with, `life` starts, keeps, ends it."""

from megido_capture.node.life import Node
from megido_capture.node.parts import Place

__all__ = ["Node", "Place"]
