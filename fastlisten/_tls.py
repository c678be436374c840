"""TLS for serve(): the handshake with its deadline, and the connection that a handler gets then.

ssl is imported only where somebody has a context already: it is much to import for who has none.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import math
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from fastlisten._core.connection import Connection

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from ssl import SSLContext, SSLSocket
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

    from fastlisten._core.proxy_header import ProxyHeader

    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# How long a handshake may take when nothing is said, in seconds: three losses of a packet, and a slow client.
HANDSHAKE_TIMEOUT = 10.0

# How often a handshake asks whether to go on, in seconds.
STEP = 0.2

# Of Linux (include/uapi/linux/tls.h), and not in the socket module: how the kernel encrypts what is sent.
SOL_TLS, TLS_TX = 282, 1

# What OpenSSL says, by what it means to whoever serves; these differ a little between its versions.
_REASONS = {
    "not TLS": {
        "BAD_PACKET",
        "BAD_RECORD_TYPE",
        "DECODE_ERROR",
        "HTTPS_PROXY_REQUEST",
        "HTTP_REQUEST",
        "LENGTH_MISMATCH",
        "LENGTH_TOO_SHORT",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_MESSAGE",
        "WRONG_VERSION_NUMBER",
    },
    "version": {
        "INAPPROPRIATE_FALLBACK",
        "NO_PROTOCOLS_AVAILABLE",
        "UNKNOWN_PROTOCOL",
        "UNSUPPORTED_PROTOCOL",
        "VERSION_TOO_LOW",
    },
    "cipher": {
        "NO_SHARED_CIPHER",
        "NO_SHARED_GROUP",
        "NO_SHARED_SIGNATURE_ALGORITHMS",
        "NO_SUITABLE_GROUPS",
        "NO_SUITABLE_KEY_SHARE",
        "NO_SUITABLE_SIGNATURE_ALGORITHM",
    },
    "client certificate": {"CERTIFICATE_VERIFY_FAILED", "PEER_DID_NOT_RETURN_A_CERTIFICATE"},
}


def handshake(sock: SSLSocket, seconds: float, given_up: Callable[[], bool] | None = None) -> None:
    """Do the handshake of a server's SSLSocket; what it takes is `seconds` at most, whatever the client does.

    given_up: asked every STEP; true ends the handshake as its deadline does.

    The socket's timeout is what it was, after a handshake that is through.  Raises OSError as
    SSLSocket.do_handshake(): TimeoutError at the deadline, ssl.SSLError.
    """
    timeout = sock.gettimeout()
    deadline = time.monotonic() + seconds
    while True:
        left = max(deadline - time.monotonic(), 0.001)  # 0 would be a try that does not wait
        sock.settimeout(left if given_up is None else min(left, STEP))
        try:
            sock.do_handshake()  # its time is for all of it: bytes that drip in make it no longer
        except TimeoutError as error:
            if error.errno is not None or time.monotonic() >= deadline or (given_up and given_up()):
                raise
        else:
            sock.settimeout(timeout)
            return


def wrap_accepted(sock: socket.socket, context: SSLContext, suppress_ragged_eofs: bool) -> SSLSocket:
    """context.wrap_socket() of a server's client, without the handshake; `sock` is closed in any case.

    With that, SSLSocket leaves itself unclosed when the client has sent a reset.
    """
    kind: Any = context.sslsocket_class
    fresh = _closing(kind)._create(
        sock,
        server_side=True,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=suppress_ragged_eofs,
        context=context,
    )
    fresh.__class__ = kind
    return fresh  # type: ignore[no-any-return]


@functools.cache
def _closing(base: Any) -> Any:
    class Closing(base):  # type: ignore[misc]
        def __del__(self) -> None:
            _socket.socket.close(self)

    return Closing


def failure_reason(error: OSError) -> str:
    """Which of TLS_FAILURES, which stats() counts, made a handshake fail."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timeout"
    reason = getattr(error, "reason", None)
    if not isinstance(reason, str) or "UNEXPECTED_EOF" in reason or "Closed before" in reason:
        return "closed"
    if "_ALERT_" in reason:
        return "alert"
    return next((name for name, reasons in _REASONS.items() if reason in reasons), "other")


def log_failure(peer: object, error: OSError) -> None:
    """Tell of a handshake that failed, to who wants to hear that much: any client can make one."""
    import logging  # not at the top: most never log

    # As text: the traceback of one that is kept would keep the socket open.
    extra = {"event": "handshake failed", "peer": peer, "reason": failure_reason(error)}
    log = logging.getLogger("fastlisten")
    log.debug("the TLS handshake of %r failed: %s", peer, str(error), extra=extra)


def reloading(
    certfile: Path | Sequence[Path | tuple[Path, Path | None]],
    keyfile: Path | None = None,
    *,
    every: float = 10.0,
) -> SSLContext:
    """A server's ssl.SSLContext that serves new files to new connections when they change on disk.

    certfile, keyfile: as for SSLContext.load_cert_chain(); a key that is encrypted is refused.  Or certfile
    is a list of (certfile, keyfile): a client gets that for the name it asks for, or else the first.
    every: how often the files are looked at, in seconds, at most, and only when a client comes.

    A certificate and a key that do not belong together, not yet, are left alone, and the log says so once.
    No handshake fails because of a change, and sessions go on across it.

    It works wherever a context does: in serve(), for asyncio's servers and uvloop's, for a socket.  What is
    set on it is for all certificates; its sni_callback is taken.

    Raises OSError (FileNotFoundError, ssl.SSLError) as load_cert_chain(), ValueError, TypeError.

    >>> import fastlisten
    >>> fastlisten.reloading("no such file.pem")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory...
    """
    from fastlisten import _reloading

    return _reloading.make(certfile, keyfile, every)


# --- the connection -------------------------------------------------------------------------------


class TLSConnection:
    """A client over TLS, as serve(ssl=...) hands it to the handler.

    It has the methods of a Connection.  Those that receive and send are ssl.SSLSocket's, with its errors:
    where a Connection raises BlockingIOError it raises ssl.SSLWantReadError, and sendmsg() is not there.

    `ssl` is the SSLSocket: cipher(), selected_alpn_protocol(), getpeercert(), ...; its descriptor is the
    connection's, and it is of use for as long as that is open.

    TCP_NODELAY is set.  Closing says to the client that this is the end (close_notify, RFC 8446, 6.1) and
    does not wait for its answer.

    >>> import fastlisten
    >>> def handler(connection: fastlisten.TLSConnection):
    ...     print(connection.ssl.version(), "from", connection.peer)
    """

    __slots__ = ("__weakref__", "_borrowed", "_connection", "_sock", "ssl")

    ssl: SSLSocket
    _sock: SSLSocket  # what the methods call

    def __init__(self, connection: Connection, sock: Any) -> None:
        self._connection = connection
        self._sock = self.ssl = self._borrowed = sock

    def close(self) -> None:
        """Close the connection; it is not an error to do it again.

        Files from makefile() that are still open keep it until the last of them is closed.
        """
        self._sock.close()

    def detach(self) -> int:
        """Give the descriptor away in the middle of TLS: returns it (-1 if closed); the caller closes it."""
        self._borrowed.let_go()
        return self._connection.detach()

    def socket(self) -> SSLSocket:
        """Turn the connection into an ssl.SSLSocket, which owns the descriptor from now on; the caller closes
        it."""
        if self._connection.fileno() == -1:
            self._connection.socket()  # raises
        sock, kind = self._borrowed, self._borrowed.__class__
        # Nothing comes between these two: Python runs signal handlers after calls and jumps.
        sock.__class__ = kind.__base__
        self._connection.detach()
        sock.lender = None
        # Who uses the connection still gets OSError (EBADF).
        self._sock = self._borrowed = kind.closed()
        return self.ssl

    @property
    def closed(self) -> bool:
        """Whether close(), detach() or socket() was called."""
        return self._connection.closed or bool(self._borrowed._closed)

    @property
    def proxy(self) -> ProxyHeader | None:
        """The ProxyHeader by which a trusted proxy has said whose connection this is; None without one."""
        return self._connection.proxy

    @property
    def peer(self) -> Any:
        """The client's address as socket.accept() gives it, also after close."""
        return self._connection.peer

    def fileno(self) -> int:
        """The descriptor as an int, -1 when closed."""
        return self._sock.fileno()

    def __enter__(self) -> TLSConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<fastlisten.TLSConnection [closed]>"
        return f"<fastlisten.TLSConnection fd={self.fileno()} peer={self.peer!r}>"

    def getpeername(self) -> Any:
        """The client's address, asked of the kernel; OSError (ENOTCONN) when it is gone."""
        return self._sock.getpeername()

    def getsockname(self) -> Any:
        """Our own address, asked of the kernel."""
        return self._sock.getsockname()

    def getsockopt(self, level: int, optname: int, *buflen: int) -> Any:
        """As socket.getsockopt()."""
        return self._sock.getsockopt(level, optname, *buflen)

    def setsockopt(self, level: int, optname: int, *value: int | ReadableBuffer | None) -> None:
        """As socket.setsockopt()."""
        self._borrowed.setsockopt(level, optname, *value)

    def settimeout(self, value: float | None) -> None:
        """Set the time in seconds a call may take: None waits without end, 0 never waits."""
        self._sock.settimeout(value)

    def gettimeout(self) -> float | None:
        """The timeout in seconds; None when calls wait without end."""
        return self._sock.gettimeout()

    def setblocking(self, flag: bool) -> None:
        """settimeout(None) for a true flag, settimeout(0.0) for a false one."""
        self._sock.setblocking(flag)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive up to `bufsize` bytes; b'' when the client has ended, by close_notify or without."""
        return self._sock.recv(bufsize, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a writable buffer, at most `nbytes` (0: its size); returns how many bytes came."""
        return self._sock.recv_into(buffer, nbytes or None, flags)

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """Send what goes of `data`, a bytes-like object; returns how many bytes that was."""
        return self._sock.send(data, flags)

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send all of `data`, a bytes-like object; the timeout is for each write of a part."""
        self._sock.sendall(data, flags)

    @property
    def ktls(self) -> bool:
        """Whether the kernel encrypts what is sent (kTLS), so that sendfile() copies nothing to here.

        It does when the context has ssl.OP_ENABLE_KTLS and the cipher, OpenSSL and Linux (its module tls) all
        can (SSL_CTX_set_options(3), Documentation/networking/tls.rst).
        """
        if sys.platform != "linux":
            return False
        try:
            return bool(self._sock.getsockopt(SOL_TLS, TLS_TX, 4))
        except OSError:  # ENOPROTOOPT, EOPNOTSUPP: it does not; and it never does on a closed connection
            return False

    def sendfile(self, file: BinaryIO, offset: int = 0, count: int | None = None) -> int:
        """As socket.sendfile(): send a file opened in binary mode; returns how many bytes went.

        With `ktls` it goes from the file to the network in the kernel (sendfile(2)).
        """
        if not self.ktls:
            return self._sock.sendfile(file, offset, count)
        from ssl import SSLSocket

        return super(SSLSocket, self._sock).sendfile(file, offset, count)

    def shutdown(self, how: int, /) -> None:
        """End one direction or both: socket.SHUT_RD, SHUT_WR, SHUT_RDWR; what comes can still be received.

        The end of ours is said with close_notify; with SHUT_WR only if the client has sent nothing that is
        still to be received, for OpenSSL would drop that, as it drops what comes in that moment: Python's
        module has it look for the client's close_notify at once.  Raises OSError (ENOTCONN) when the client
        is gone.
        """
        if how == socket.SHUT_RDWR or (how == socket.SHUT_WR and not self._borrowed.waits()):
            self._borrowed.say_end()
        self._connection.shutdown(how)

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """A file on the connection, as socket.makefile(); the caller closes it."""
        file: IO[Any] = self._borrowed.makefile(
            mode, buffering, encoding=encoding, errors=errors, newline=newline
        )
        return file


class _Lent:
    """What SSLSocket._create() asks of a socket and makes its own: a Connection's descriptor, which stays the
    Connection's on every line."""

    family = type = proto = -1  # to be found out

    def __init__(self, connection: Connection) -> None:
        self.fileno = connection.fileno
        self.gettimeout = connection.gettimeout

    def getsockopt(self, level: int, option: int) -> int:
        return socket.SOCK_STREAM  # SO_TYPE

    def detach(self) -> None:
        """SSLSocket has the number now, and the Connection the descriptor."""


@functools.cache
def _borrowing(base: Any) -> Any:
    """An SSLSocket class whose descriptor is a Connection's: neither its end nor close() closes it."""

    class Borrowing(base):  # type: ignore[misc]
        """It is to the Connection what a file of makefile() is: the last to let go closes."""

        __module__, __qualname__ = base.__module__, base.__qualname__

        lender: Connection | None = None
        through = False  # the handshake is
        patience = HANDSHAKE_TIMEOUT  # seconds for what is said at the end to find room in the kernel

        def let_go(self) -> None:
            lender, self.lender = self.lender, None
            self._sslobj = None
            self.detach()
            if lender is not None:
                lender._decref_socketios()

        def _real_close(self) -> None:
            if self.through:
                self.say_end()
            self.let_go()

        def __del__(self) -> None:
            self.let_go()

        def read(self, size: int = 1024, buffer: Any = None) -> Any:
            try:
                return base.read(self, size, buffer)
            except BrokenPipeError:
                # read(2) has no such error: after an end without close_notify, as when the connection is cut,
                # OpenSSL (3.6) has tried to send its alert.
                if not self.suppress_ragged_eofs:
                    raise
                return b"" if buffer is None else 0

        @classmethod
        def closed(cls) -> Any:
            """One without a descriptor."""
            sock = cls.__new__(cls)
            sock._sslobj, sock._connected, sock._closed, sock._io_refs = None, True, True, 0
            return sock

        def waits(self) -> bool:
            """Whether something has come that was not received."""
            return self.fileno() == -1 or self.pending() > 0 or _ready(self.fileno(), selectors.EVENT_READ, 0)

        def say_end(self) -> None:
            """Send close_notify, without a wait for the client's."""
            if self._sslobj is not None:
                _say_end(self, self._sslobj, self.patience)

    return Borrowing


def _say_end(sock: Any, tls: Any, patience: float) -> None:
    """Send close_notify on an SSLSocket; patience: in seconds, until it finds room in the kernel."""
    import ssl

    timeout = sock.gettimeout()
    deadline = time.monotonic() + min(patience, math.inf if timeout is None else timeout)
    try:
        sock.settimeout(0)
        while True:
            try:
                tls.shutdown()
                return
            except ssl.SSLWantWriteError:
                left = deadline - time.monotonic()
                if not _ready(sock.fileno(), selectors.EVENT_WRITE, left):
                    return
    except (OSError, ValueError):  # it has gone, or the client's close_notify has not come
        return
    finally:
        with contextlib.suppress(OSError):
            sock.settimeout(timeout)


def _ready(fd: int, event: int, seconds: float) -> bool:
    """Whether a descriptor becomes ready for this within so many seconds."""
    selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
    with selector() as waiting:
        waiting.register(fd, event)
        return bool(waiting.select(max(seconds, 0)))


class TLSHandler:
    """Calls a handler with a TLSConnection, after the handshake, in the thread that handles the client.

    context, seconds: of the handshake, which has failed after that time; such a client is counted, closed
    and not heard of any more.  on_error: gets the TLSConnection, too.
    """

    def __init__(
        self,
        handler: Callable[[TLSConnection], object],
        on_error: Callable[[Exception, Any], object] | None,
        context: SSLContext,
        seconds: float,
    ) -> None:
        self._handler = handler
        self._on_error = on_error
        self._context = context
        self._seconds = seconds
        kind: Any = context.sslsocket_class
        self._class = _borrowing(kind)
        self._failed: dict[Connection, TLSConnection] = {}  # their handlers have raised

    def __call__(self, connection: Connection) -> None:
        sock = self._through(connection)
        if sock is None:
            return
        tls = TLSConnection(connection, sock)
        try:
            self._handler(tls)
        except Exception:
            if self._on_error is not None:
                self._failed[connection] = tls
            else:
                sock.patience = 0
                tls.close()
            raise
        except BaseException:  # what ends it all waits for nothing
            sock.patience = 0
            tls.close()
            raise
        tls.close()

    def _through(self, connection: Connection) -> Any:
        """The connection's SSLSocket after the handshake; None when that has failed."""
        # Or the first answer waits for the client's delayed acknowledgement of TLS 1.3's tickets, 40 ms.
        with contextlib.suppress(OSError):  # it is a unix socket
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = None
        try:
            # What SSLContext.wrap_socket() does, which would take the descriptor over.
            sock = self._class._create(
                _Lent(connection), server_side=True, do_handshake_on_connect=False, context=self._context
            )
            sock.lender = connection
            connection._io_refs += 1
            handshake(sock, self._seconds)
            connection._tls_completed()
            sock.through = True
            return sock
        except OSError as error:
            connection._tls_failed(failure_reason(error))
            log_failure(connection.peer, error)
            if sock is not None:
                sock.close()
            return None
        except BaseException:
            if sock is not None:
                sock.close()
            raise

    def on_error(self, error: Exception, connection: Connection) -> None:
        """Hand what a handler raised on."""
        tls = self._failed.pop(connection, None)
        assert self._on_error is not None
        try:
            self._on_error(error, connection if tls is None else tls)
        finally:
            if tls is not None:
                tls.close()
