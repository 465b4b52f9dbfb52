"""The messages of the events topic: most arrive at once and once, some late, some twice, a few unreadable."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from app.sandbox.people import DAY
from app.sandbox.simulation.progress import MINUTE, iso_time
from app.sandbox.simulation.state import Simulation

LATE, TWICE, UNREADABLE = 0.012, 0.010, 0.0003
"""Shares of all messages."""
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_BASE32_TRIPLES = tuple(_BASE32[n >> 10] + _BASE32[n >> 5 & 31] + _BASE32[n & 31] for n in range(1 << 15))


class Messages:
    """Sends stock events and behaviour events."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation

    def stock_event(
        self, time: int, kind: str, pair: int, quantity: int, details: dict[str, Any], channel: str = "warehouse"
    ) -> None:
        """Send an event about a pair of store and product; `details` are added to its metadata."""
        store, product = self.simulation.stock.place(pair)
        name = self.simulation.catalogue[product].product_id
        rest = json.dumps(details, separators=(",", ":"))[1:] if details else "}"
        metadata = f'{{"store_id":"{store}","product_id":"{name}","quantity":{quantity}{"," if details else ""}{rest}'
        value = (
            f'{{"event_id":"{self._event_id(time)}","event_type":"{kind}","timestamp":"{iso_time(time)}",'
            f'"channel":"{channel}","metadata":{metadata}}}'
        )
        self._send(time, f"{store}|{name}", value)

    def behaviour_event(self, time: int, kind: str, visitor: tuple[int | None, str, str, str, str], metadata: str = "{}") -> None:
        """Send an event of a visitor: user id or None, session, device, IP address, channel. metadata: JSON."""
        user, session, device, ip, channel = visitor
        value = (
            f'{{"event_id":"{self._event_id(time)}","event_type":"{kind}","timestamp":"{iso_time(time)}",'
            f'"user_id":{"null" if user is None else user},"session_id":"{session}","device_id":"{device}","ip_address":"{ip}",'
            f'"channel":"{channel}","metadata":{metadata}}}'
        )
        self._send(time, device if user is None else str(user), value)

    def _send(self, time: int, key: str, value: str) -> None:
        simulation, random = self.simulation, self.simulation.random
        draw = random.random()
        if draw < LATE:
            simulation.at(time + random.randrange(5 * MINUTE, 3 * DAY), "send", key, value)
            return
        simulation.sink.event(key, value, time)
        if draw < LATE + TWICE:
            simulation.at(time + random.randrange(1000, 2 * DAY), "send", key, value)
        elif draw > 1 - UNREADABLE:
            simulation.sink.event(key, _unreadable(random, value), time)

    def resend(self, time: int, key: str, value: str) -> None:
        """Send a late or repeated message."""
        self.simulation.sink.event(key, value, time)

    def _event_id(self, time: int) -> str:
        """Return an id that sorts by time, like a ULID."""
        high = time >> 15
        return (
            f"{_BASE32_TRIPLES[high >> 30][2]}{_BASE32_TRIPLES[high >> 15 & 0x7FFF]}{_BASE32_TRIPLES[high & 0x7FFF]}"
            f"{_BASE32_TRIPLES[time & 0x7FFF]}{self.simulation.random.getrandbits(64):016X}"
        )


def _unreadable(random: Random, value: str) -> bytes:
    """Return a message cut in half, bytes that are no text, or a message without its id or its time."""
    style = random.randrange(4)
    if style == 0:
        return value[: len(value) // 2].encode()
    if style == 1:
        return b"\xff\xfe\x00 not text"
    content = json.loads(value)
    content.pop("event_id" if style == 2 else "timestamp")
    return json.dumps(content).encode()
