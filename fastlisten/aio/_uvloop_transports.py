"""What uvloop's event loop does with transports: its own methods take uvloop's alone, these ours, too."""

from __future__ import annotations

import weakref
from asyncio import selector_events, sslproto
from typing import Any

from fastlisten.aio._transport import SocketTransport

try:
    import uvloop
except ImportError:
    raise ImportError("UvloopEventLoop needs uvloop: pip install uvloop") from None

_Loop: Any = uvloop.Loop
# Its methods ask nothing of the loop that uvloop lacks.
_AsyncioLoop: Any = selector_events.BaseSelectorEventLoop


def teach(loop: Any) -> None:
    """Have a uvloop.Loop, not one of a class derived from it, know our transports; that is an object of
    KnowingUvloop then, since methods in C cannot be changed one by one."""
    if type(loop) is _Loop:
        loop.__class__ = KnowingUvloop
        loop._transports = weakref.WeakValueDictionary()


class KnowsTransports:
    """A mixin, before uvloop.Loop in the bases."""

    def __init__(self) -> None:
        super().__init__()
        # As asyncio's selector loop has it: the transports whose descriptors somebody was told of.
        self._transports: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    # What takes a descriptor, for the hub, too.
    _add_reader = _Loop.add_reader
    _remove_reader = _Loop.remove_reader
    _add_writer = _Loop.add_writer
    _remove_writer = _Loop.remove_writer

    _ensure_fd_no_transport = _AsyncioLoop._ensure_fd_no_transport

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        """As uvloop's; RuntimeError for a transport's descriptor, ours too."""
        self._ensure_fd_no_transport(fd)
        self._add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> Any:
        """As uvloop's; RuntimeError for a transport's descriptor, ours too."""
        self._ensure_fd_no_transport(fd)
        return self._remove_reader(fd)

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:
        """As uvloop's; RuntimeError for a transport's descriptor, ours too."""
        self._ensure_fd_no_transport(fd)
        self._add_writer(fd, callback, *args)

    def remove_writer(self, fd: Any) -> Any:
        """As uvloop's; RuntimeError for a transport's descriptor, ours too."""
        self._ensure_fd_no_transport(fd)
        return self._remove_writer(fd)

    async def sock_recv(self, sock: Any, nbytes: int) -> Any:
        """As uvloop's; RuntimeError for a transport's socket, ours too."""
        self._ensure_fd_no_transport(sock)
        return await _Loop.sock_recv(self, sock, nbytes)

    async def sock_recv_into(self, sock: Any, buf: Any) -> Any:
        """As uvloop's; RuntimeError for a transport's socket, ours too."""
        self._ensure_fd_no_transport(sock)
        return await _Loop.sock_recv_into(self, sock, buf)

    async def sock_sendall(self, sock: Any, data: Any) -> Any:
        """As uvloop's; RuntimeError for a transport's socket, ours too."""
        self._ensure_fd_no_transport(sock)
        return await _Loop.sock_sendall(self, sock, data)

    async def sock_connect(self, sock: Any, address: Any) -> Any:
        """As uvloop's; RuntimeError for a transport's socket, ours too."""
        self._ensure_fd_no_transport(sock)
        return await _Loop.sock_connect(self, sock, address)

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        """As uvloop's, for our transports, too, and for TLS inside of their TLS."""
        if isinstance(transport, SocketTransport | sslproto._SSLProtocolTransport):
            return await _AsyncioLoop.start_tls(self, transport, protocol, sslcontext, **options)
        return await _Loop.start_tls(self, transport, protocol, sslcontext, **options)

    _sendfile_fallback = _AsyncioLoop._sendfile_fallback

    async def sendfile(
        self, transport: Any, file: Any, offset: int = 0, count: Any = None, **options: Any
    ) -> Any:
        """As asyncio's for our transports, by reading the file in a thread; uvloop's own has none."""
        if isinstance(transport, SocketTransport):
            return await _AsyncioLoop.sendfile(self, transport, file, offset, count, **options)
        return await _Loop.sendfile(self, transport, file, offset, count, **options)


class KnowingUvloop(KnowsTransports, _Loop):  # type: ignore[misc]
    """uvloop.Loop that knows our transports."""
