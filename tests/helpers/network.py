"""Several hosts on this machine: network namespaces, each joined to this one's hub by a cable of its own.

Nothing of it is seen by the machine's own network, and nothing is sent to an address outside; ip-netns(8) is
not used, as its names outlive a test that is killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator

from helpers.probes import which
from helpers.programs import run
from helpers.waiting import wait_until

NET = "10.77"  # RFC 1918; it exists in the namespaces alone


class Host:
    """A network namespace, for as long as a process in it lives."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        # cat ends with the pipe, and so with the test, however that ends
        self._keeper = stack.enter_context(
            subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
        assert self._keeper.stdin is not None
        stack.callback(self._keeper.stdin.close)
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self.process}/ns/net") != own)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def process(self) -> int:
        return self._keeper.pid

    def command(self, *command: str) -> list[str]:
        """Return the command that runs another one in here."""
        return ["nsenter", f"--target={self.process}", "--net", "--", *command]

    def run(self, *command: str) -> str:
        """Run a command in here to its end, and return what it printed."""
        return run(self.command(*command), limit=20).stdout


class Network:
    """A hub, and hosts that see it and nobody else.

    hosts: by name; each has an address, and the hub has one for each.
    """

    def __init__(self, stack: contextlib.ExitStack, *names: str) -> None:
        self.hub = Host(stack)
        self.hosts = {name: Host(stack) for name in names}
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        for name, host in self.hosts.items():
            peer = f"peer name eth0 netns {host.process}".split()
            self.hub.run("ip", "link", "add", name, "type", "veth", *peer)
            self.hub.run("ip", "address", "add", f"{self.hub_address(name)}/30", "dev", name)
            host.run("ip", "address", "add", f"{self.address(name)}/30", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            self.cable(name, True)

    def address(self, name: str) -> str:
        """Where the hub finds a host."""
        return f"{NET}.{self._numbers[name]}.2"

    def hub_address(self, name: str) -> str:
        """Where a host finds the hub."""
        return f"{NET}.{self._numbers[name]}.1"

    def cable(self, name: str, plugged: bool) -> None:
        """Plug a host's cable in, or pull it."""
        self.hub.run("ip", "link", "set", name, "up" if plugged else "down")


@contextlib.contextmanager
def network(*names: str) -> Iterator[Network]:
    """Give a network of these hosts; the names are those of interfaces, too: short."""
    with contextlib.ExitStack() as stack:
        yield Network(stack, *names)


@functools.cache
def has_networks() -> bool:
    """Tell whether this process may make namespaces and cables."""
    if not all(map(which, ["unshare", "nsenter", "ip"])):
        return False
    try:
        with network("probe"):
            return True
    except (AssertionError, OSError):
        return False
