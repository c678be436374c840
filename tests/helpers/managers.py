"""A service manager, as far as sd_notify(3) goes: the socket of NOTIFY_SOCKET."""

import array
import contextlib
import os
import socket
from collections.abc import Iterator

from helpers.waiting import LIMIT


class Manager:
    """Receives what services tell; `address` is for NOTIFY_SOCKET."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.socket = sock
        self.address = address

    def message(self) -> list[str]:
        """Wait for the next message and return its lines; descriptors that came with it are closed."""
        lines, numbers = self.with_descriptors()
        for number in numbers:
            os.close(number)
        return lines

    def with_descriptors(self) -> tuple[list[str], list[int]]:
        """Wait for the next message and return its lines and its descriptors, which the caller closes."""
        numbers = array.array("i")
        room = socket.CMSG_SPACE(300 * numbers.itemsize)
        text, received, flags, _ = self.socket.recvmsg(1 << 16, room, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        for level, kind, data in received:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(data)
        return text.decode().split("\n"), list(numbers)

    def message_with(self, line: str) -> list[str]:
        """Wait for the message that has this line; those before it are dropped."""
        while line not in (lines := self.message()):
            pass
        return lines

    def tells_nothing(self) -> bool:
        """Tell whether there is no message now."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(LIMIT)
        return False


@contextlib.contextmanager
def manager(address: str) -> Iterator[Manager]:
    """Give a manager at this address, "/..." or "@..."."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(LIMIT)
        sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        yield Manager(sock, address)
