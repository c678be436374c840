"""What admission promises, in plain Python and without a limit to its memory; and random events for both."""

import ipaddress
import random
from collections.abc import Iterable, Iterator
from typing import Any

SECOND = 10**9  # ns

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Source:
    """What one source has used up."""

    def __init__(self) -> None:
        self.arrival = 0.0  # ns: when the next one would come if all kept to the rate
        self.open = 0
        self.penalised_until = 0


class Model:
    """Options as Admission has them; times are in ns."""

    def __init__(
        self,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        concurrent: int | None = None,
        rate: float | None = None,
        burst: int = 1,
        prefix4: int = 32,
        prefix6: int = 64,
        exempt: Iterable[str] = (),
    ) -> None:
        self.allow, self.deny, self.exempt = (
            [ipaddress.ip_network(text) for text in networks] for networks in (allow, deny, exempt)
        )
        self.concurrent = concurrent
        self.interval = None if rate is None else round(SECOND / rate)
        self.burst = burst
        self.prefixes = {4: prefix4, 6: prefix6}
        self.sources: dict[Any, Source] = {}

    def source(self, address: Address) -> Source:
        network = ipaddress.ip_network((address, self.prefixes[address.version]), strict=False)
        return self.sources.setdefault(network, Source())

    def reason(self, address: Address, now: int) -> str | None:
        """Say why somebody may not come in now; None: he may."""
        if any(address in network for network in self.deny):
            return "denied"
        if any(address in network for network in self.exempt):
            return None
        if self.allow and not any(address in network for network in self.allow):
            return "not allowed"
        source = self.source(address)
        if source.penalised_until > now:
            return "penalised"
        if self.concurrent is not None and source.open >= self.concurrent:
            return "concurrent"
        if self.interval is not None and source.arrival > now + (self.burst - 1) * self.interval:
            return "rate"
        return None

    def admit(self, address: Address, now: int) -> bool:
        """Note that somebody came in; returns whether he counts until he leaves."""
        if any(address in network for network in self.exempt):
            return False
        source = self.source(address)
        if self.interval is not None:
            source.arrival = max(source.arrival, now) + self.interval
        source.open += 1
        return True

    def leave(self, address: Address) -> None:
        self.source(address).open -= 1

    def penalise(self, address: Address, until: int) -> None:
        source = self.source(address)
        source.penalised_until = max(source.penalised_until, until)

    def release(self, address: Address) -> None:
        self.source(address).penalised_until = 0


def addresses(number: int, chance: random.Random) -> list[Address]:
    """Return addresses of both families, many of which share a network."""
    found: list[Address] = []
    for _ in range(number):
        if chance.random() < 0.5:
            found.append(ipaddress.IPv4Address((10 << 24) + chance.randrange(number)))
        else:
            network = (0x20010DB8 << 96) + (chance.randrange(number // 4 + 1) << 64)
            found.append(ipaddress.IPv6Address(network + chance.randrange(3)))
    return found


def events(number: int, chance: random.Random, sources: int) -> Iterator[tuple[str, Address, int]]:
    """Give random events: what happens, to whom, and when."""
    known = addresses(sources, chance)
    now = SECOND
    for _ in range(number):
        now += int(chance.expovariate(1 / (SECOND / 1000)))
        what = chance.choices(("come", "leave", "penalise", "release"), (60, 40, 1, 1))[0]
        yield what, known[min(int(chance.expovariate(8 / sources)), sources - 1)], now
