"""How the daemon and the courier talk: JSON objects, in as many packets as each needs.

A packet's first byte says whether another one of the same message follows. Daemon to courier:
    {"do": "configure", "sinks": [...]}                             instead of all that was configured before
    {"do": "deliver", "id": 7, "sink": "mail", "notices": [...]}
Courier to daemon:
    {"do": "ready"}                                                 once, at its start, or
    {"do": "fail", "why": "..."}                                    it cannot run, and ends
    {"id": 7, "ok": true, "permanent": false, "detail": "...", "missed": "", "seconds": 0.2}
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKET = 60 << 10
MOST = 8 << 20
"""Bytes of a message."""
_MORE, _LAST = b"+", b"."


def packets(message: dict[str, Any]) -> Iterator[bytes]:
    """ValueError: it is too large, or no JSON."""
    encoded = json.dumps(message).encode()
    if len(encoded) > MOST:
        raise ValueError(f"{len(encoded)} bytes are more than {MOST}")
    starts = range(0, len(encoded), PACKET)
    for start in starts:
        yield (_LAST if start == starts[-1] else _MORE) + encoded[start : start + PACKET]


class Joiner:
    """The receiving side."""

    def __init__(self) -> None:
        self._pieces = bytearray()

    def take(self, packet: bytes) -> dict[str, Any] | None:
        """The message that is complete now. ValueError: it is none."""
        self._pieces += packet[1:]
        if len(self._pieces) > MOST:
            raise ValueError("a message without end")
        if packet[:1] == _MORE:
            return None
        encoded, self._pieces = self._pieces, bytearray()
        message = json.loads(encoded)
        if packet[:1] != _LAST or not isinstance(message, dict):
            raise ValueError("no message")
        return message
