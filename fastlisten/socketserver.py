"""Drop-in for `socketserver`: the stream servers serve with fastlisten's loop.

Every name of the original is here and means the same.  What differs:

- TCPServer, UnixStreamServer and their threading variants accept and dispatch in fastlisten's loop; the
  threading variants keep threads, as many as are needed, in place of starting one for each client.
- shutdown() in the thread that serves - in a handler, or in a signal handler - only asks the loop to end.
  The original waits there for itself, without end.
- Out of descriptors or memory the servers pause, where the original spins.
- A server whose `socket` is a listening ssl.SSLSocket (HTTPSServer, or `server.socket =
  context.wrap_socket(server.socket, server_side=True)`) gives a handshake a deadline, `handshake_timeout`,
  and a threading one does it in the handler's thread.  In the original a client that says nothing keeps all
  others, and shutdown(), waiting.  Who does not get through is counted in `tls_failures`; as in the original
  nothing more is said of it.  With do_handshake_on_connect=False the handshake is the handler's own affair.
- The class attributes `first_bytes_timeout`, `proxy_protocol` and `admission_control` are serve()'s options
  first_bytes, proxy and admission: a client that says nothing costs no thread, `client_address` is the one
  that a trusted proxy's header names, and who may not come in costs nothing; a client counts until its
  request is handled.  They are for serve_forever() with fastlisten's loop.  Elsewhere the first has no
  effect; with the others, which must not be passed over, serve_forever() and handle_request() raise
  ValueError.

A hook that a subclass overrides is called where the original calls it.  What of the loop cannot work with it
is then the original's: all of it for get_request() and service_actions(), the threads for verify_request()
and process_request().  Datagram and forking servers are the original's throughout.
"""

from __future__ import annotations

import _thread
import functools
import os
import socket as _socket
import socketserver as _original
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socketserver import __all__ as __all__
from typing import TYPE_CHECKING, Any

from fastlisten._core.accept import Shortage
from fastlisten._core.connection import Connection
from fastlisten._core.hooks import CountedUntilHandled, RequestHooks
from fastlisten._core.loop import Loop
from fastlisten._core.standard import StandardSocket
from fastlisten._core.state import State
from fastlisten._listener import Listener, make_loop, serve_options
from fastlisten._options import Checked
from fastlisten._tls import HANDSHAKE_TIMEOUT, failure_reason, handshake, log_failure, wrap_accepted

if TYPE_CHECKING:
    from ssl import SSLSocket

    from fastlisten._admission import Admission
    from fastlisten._proxy import Proxy

# As many threads as clients, as in the original.
UNLIMITED = 2**31 - 1

# For how long a handler may keep others from being accepted before another thread does that, in microseconds.
# It has to be longer than clients take to say what they want after they have connected, or each of them costs
# several switches between threads.
TICK = 2000

# A poll_interval above this, in seconds, is for the original to accept or refuse.
LONGEST_INTERVAL = 1e6

_StandardSocket = StandardSocket
_states = threading.RLock()  # re-entrant: a signal handler may call shutdown() while its thread holds it

# The hooks that the loop stands for; where one of them is another function, a subclass has overridden it.
_HOOKS = {
    "fileno": _original.TCPServer.fileno,
    "get_request": _original.TCPServer.get_request,
    "service_actions": _original.BaseServer.service_actions,
    "_handle_request_noblock": getattr(_original.BaseServer, "_handle_request_noblock", None),
}
# The loop's threads stand for these.
_THREAD_HOOKS = {
    "verify_request": _original.BaseServer.verify_request,
    "process_request": _original.ThreadingMixIn.process_request,
}
# And for these there is RequestHooks, which does the same in fewer steps.
_REQUEST_HOOKS = {
    "finish_request": _original.BaseServer.finish_request,
    "shutdown_request": _original.TCPServer.shutdown_request,
    "close_request": _original.TCPServer.close_request,
}
_INLINE_REQUEST_HOOKS = {
    "verify_request": _original.BaseServer.verify_request,
    "process_request": _original.BaseServer.process_request,
}
_THREAD_REQUEST_HOOKS = {
    "process_request_thread": _original.ThreadingMixIn.process_request_thread,
}


def __getattr__(name: str) -> Any:
    """Every name that is not defined here is the original's, as it is now."""
    return getattr(_original, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_original)})


class AcceptMixIn:
    """Gives fastlisten's loop to any class made of the original's stream servers; put it first.

    `class Server(AcceptMixIn, xmlrpc.server.SimpleXMLRPCServer): ...`
    """

    # How long a TLS handshake may take, in seconds, where `socket` is a listening ssl.SSLSocket.
    handshake_timeout: float = HANDSHAKE_TIMEOUT

    # For how long a client may send nothing, in seconds; None: for as long as its handler lets it.
    first_bytes_timeout: float | None = None

    # Whose PROXY headers are read.
    proxy_protocol: Proxy | None = None

    # Who may come in, and how many of one source.
    admission_control: Admission | None = None

    # What the original's classes, later in the order of the bases, have.
    socket: _socket.socket
    block_on_close: bool
    daemon_threads: bool
    _BaseServer__is_shut_down: threading.Event
    _BaseServer__shutdown_request: bool

    _serving: tuple[threading.Thread, ...] = ()  # that are in serve_forever()
    _steps = False  # handle_request() was called: shutdown() may have nothing to wait for
    _listener: Listener | None = None  # what fastlisten's loop serves
    _loops: tuple[Loop, ...] = ()  # whose threads may still have handlers at work
    _shortage: Shortage | None = None  # of get_request(), once it ran out of resources
    _pause: Any = None  # a lock: held while get_request() pauses, unless somebody ends that
    _tls_counts: State | None = None  # of handshakes; nobody's clients

    @property
    def tls_failures(self) -> dict[str, int]:
        """How many TLS handshakes have failed, by reason; ListenerStats has the reasons."""
        return {} if self._tls_counts is None else self._tls_counts.tls_failures()

    @property
    def tls_handshakes(self) -> int:
        """How many TLS handshakes were completed."""
        counted: int = 0 if self._tls_counts is None else self._tls_counts.counts()["tls_handshakes"]
        return counted

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until shutdown().

        poll_interval: how often, in seconds, service_actions() is called, if a subclass has one.
        Raises what a hook or the listening socket raised, and KeyboardInterrupt; ValueError when the class
        has a proxy_protocol or an admission_control, and what else it asks for is not for fastlisten's loop.
        """
        began_open = self.socket.fileno() >= 0
        thread = threading.current_thread()
        with _states:
            self._serving += (thread,)
        try:
            served = False
            if self._fits_loop(poll_interval):
                with _listener_on(self.socket) as listener:
                    served = listener is not None and self._serve(listener)
            if not served and began_open and self.socket.fileno() < 0:  # server_close() was quicker
                self._BaseServer__shutdown_request = False
                self._BaseServer__is_shut_down.set()
            elif not served:
                self._refuse_original()
                with _states:
                    self._begin()
                super().serve_forever(poll_interval)  # type: ignore[misc]
        except BaseException:
            with _states:
                if self._listener is None:  # it may have failed before there was an end to wait for
                    self._BaseServer__shutdown_request = False
                    self._BaseServer__is_shut_down.set()
            raise
        finally:
            with _states:
                left = list(self._serving)
                left.remove(thread)
                self._serving = tuple(left)

    def _fits_loop(self, poll_interval: object) -> bool:
        """Whether fastlisten's loop does what this server's class asks for."""
        sock = self.socket
        return (
            (isinstance(sock, Listener) or type(sock) is _StandardSocket or _is_tls(sock))
            and sock.fileno() >= 0
            and sock.type == _socket.SOCK_STREAM
            and (
                poll_interval is None
                or (isinstance(poll_interval, int | float) and poll_interval < LONGEST_INTERVAL)
            )
            and _untouched(self, _HOOKS)
        )

    def _serve(self, listener: Listener) -> bool:
        """Serve with the loop; returns False, and has done nothing, when another thread does so already."""
        hooks, options = self._hooks(listener)
        handle: Callable[[Connection], None] = hooks.in_thread if options.leave else hooks.in_line
        if _is_tls(self.socket):
            handle = _over_tls(self, hooks, options.leave)
        if options.admission is not None:
            handle = CountedUntilHandled(handle)
        loop = make_loop([listener], handle, options)
        with _states:
            if self._listener is not None:
                return False
            self._listener = listener
            if options.leave:
                self._loops = (*(old for old in self._loops if old.threads_now()[0]), loop)
                _with_threads.add(self)
            self._begin()
            asked = self._BaseServer__shutdown_request
        try:
            if not asked:
                loop.run()
        except OSError:
            if self.socket.fileno() >= 0:
                raise
            # server_close() was quicker than the loop's beginning
        finally:
            with _states:
                self._listener = None
                if self._BaseServer__shutdown_request:
                    self._BaseServer__shutdown_request = False
                    listener._state.answered()  # shutdown() may have come when the loop was over
                self._BaseServer__is_shut_down.set()
        hooks.raise_failure()
        return True

    def _begin(self) -> None:
        """Have shutdown() wait for the end that is to come.

        Who has yet to wait for the one before, of a server that serves again at once, still finds that one.
        """
        if self._BaseServer__is_shut_down.is_set():
            self._BaseServer__is_shut_down = threading.Event()

    def _hooks(self, listener: Listener) -> tuple[RequestHooks, Checked]:
        """What to do with a client, and the options of the loop that does it."""
        options = functools.partial(
            serve_options,
            first_bytes=self.first_bytes_timeout,
            proxy=self.proxy_protocol,
            admission=self.admission_control,
        )
        plain = not _is_tls(self.socket)  # what RequestHooks does in fewer steps is not for an SSLSocket
        if not _untouched(self, _THREAD_HOOKS):
            plain = plain and _untouched(self, _REQUEST_HOOKS | _INLINE_REQUEST_HOOKS)
            hooks = RequestHooks(self, listener, plain)
            return hooks, options(hooks.in_line)
        plain = plain and _untouched(self, _REQUEST_HOOKS | _THREAD_REQUEST_HOOKS)
        hooks = RequestHooks(self, listener, plain)
        return hooks, options(
            hooks.in_thread, threads=(1, UNLIMITED), leave=True, daemon=self.daemon_threads, tick=TICK
        )

    def shutdown(self) -> None:
        """Ask serve_forever() to end, and wait for that.

        In the thread that serves, which is the handlers' if there are no others, it does not wait.
        """
        with _states:
            self._BaseServer__shutdown_request = True
            if self._listener is not None:
                self._listener.stop()
            self._end_pause()
            wait = bool(self._serving) or not self._steps
            ended = self._BaseServer__is_shut_down
            if threading.current_thread() in self._serving:
                wait = False
        if wait:
            ended.wait()

    def server_close(self) -> None:
        """Close the listening socket; with block_on_close, wait for the handlers in other threads.

        A serve_forever() that runs ends.
        """
        with _states:
            listener = self._listener
        if listener is not None:
            listener._state.leave()
        super().server_close()  # type: ignore[misc]
        self._end_pause()
        loops, self._loops = self._loops, ()
        if loops and self.block_on_close and not self.daemon_threads:
            for loop in loops:
                loop.join()

    def _refuse_original(self) -> None:
        """ValueError for what the original's loop would pass over."""
        for name in ("proxy_protocol", "admission_control"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs fastlisten's loop, and the original's would accept here")

    def handle_request(self) -> None:
        """Handle one request, waiting for it as long as `timeout` says."""
        self._refuse_original()
        self._steps = True
        super().handle_request()  # type: ignore[misc]

    def get_request(self) -> tuple[Any, Any]:
        """Accept one client: (socket, address); over TLS, with its handshake, which has its deadline.

        Before an OSError that says that descriptors or memory ran out it pauses: the original's loop drops
        the error and tries again at once.
        """
        get_request = super().get_request  # type: ignore[misc]
        original = getattr(get_request, "__func__", None) is _original.TCPServer.get_request
        if original and _is_tls(self.socket):
            get_request = self._get_tls_request
        try:
            request: tuple[Any, Any] = get_request()
        except OSError as error:
            self._shortage = self._shortage or Shortage()
            self._pause_for(self._shortage.pause_after(error) or 0)
            raise
        if self._shortage is not None:
            self._shortage.over()
        return request

    def _get_tls_request(self) -> tuple[SSLSocket, Any]:
        """What SSLSocket.accept() does, within the handshake's time, and no longer than until shutdown()."""
        listener: Any = self.socket
        sock, address = _StandardSocket.accept(listener)
        return self._start_tls(sock, address, self._asked_to_end), address

    def _start_tls(
        self, sock: _socket.socket, address: Any, given_up: Callable[[], bool] | None
    ) -> SSLSocket:
        """Turn a client's socket, which is closed if that fails, into an SSLSocket after its handshake.

        Raises OSError, which has been counted and logged, when the handshake fails.
        """
        listener: Any = self.socket
        request = None
        try:
            request = wrap_accepted(sock, listener.context, listener.suppress_ragged_eofs)
            vars(request)["do_handshake_on_connect"] = listener.do_handshake_on_connect
            if listener.do_handshake_on_connect:
                handshake(request, self.handshake_timeout, given_up)
                self._tls_counter().tls_completed()
        except BaseException as error:
            (request or sock).close()
            if isinstance(error, OSError):
                self._tls_failed(address, error)
            raise
        return request

    def _tls_counter(self) -> State:
        with _states:
            if self._tls_counts is None:
                self._tls_counts = State(self.socket)
            return self._tls_counts

    def _tls_failed(self, address: Any, error: OSError) -> None:
        self._tls_counter().tls_failed(failure_reason(error))
        log_failure(address, error)

    def _asked_to_end(self) -> bool:
        """Whether shutdown() or server_close() was called."""
        return self._BaseServer__shutdown_request or self.socket.fileno() < 0

    def _pause_for(self, seconds: float) -> None:
        """Wait for so long, or until shutdown() or server_close()."""
        # Not an Event: a signal handler that calls shutdown() would wait for the lock in it that we hold.
        self._pause = pause = _thread.allocate_lock()
        pause.acquire()
        if not self._asked_to_end():
            pause.acquire(timeout=seconds)

    def _end_pause(self) -> None:
        if self._pause is not None:
            with suppress(RuntimeError):  # it is over
                self._pause.release()


def _is_tls(sock: object) -> bool:
    """Whether a listening socket is an ssl.SSLSocket that accepts as the original does."""
    ssl = sys.modules.get("ssl")  # it is not ours to import: without it nobody has such a socket
    return ssl is not None and isinstance(sock, ssl.SSLSocket) and type(sock).accept is ssl.SSLSocket.accept


def _over_tls(server: AcceptMixIn, hooks: RequestHooks, in_thread: bool) -> Callable[[Connection], None]:
    """What hooks.in_thread() or hooks.in_line() does, after the client's handshake in the same thread."""
    handle = hooks.request_in_thread if in_thread else hooks.request_in_line
    # In the thread of serve_forever(), shutdown() waits for it.
    given_up = None if in_thread else server._asked_to_end

    def handler(connection: Connection) -> None:
        address = connection.peer
        try:
            request = server._start_tls(connection.socket(), address, given_up)
        except OSError:
            return  # as the original, whose get_request() has failed
        except Exception as error:
            hooks.fail(error)
            return
        handle(request, address)

    return handler


def _untouched(server: object, hooks: dict[str, Any]) -> bool:
    """Whether all these methods of a server are the original's, or AcceptMixIn's in their place."""
    for name, original in hooks.items():
        if name in vars(server):
            return False
        for base in type(server).__mro__:
            if base is not AcceptMixIn and name in vars(base):
                if vars(base)[name] is not original:
                    return False
                break
    return True


@contextmanager
def _listener_on(sock: _socket.socket) -> Iterator[Listener | None]:
    """A Listener on this socket's descriptor, which stays the socket's; None if it has just been closed."""
    if isinstance(sock, Listener):
        yield sock
        return
    listener = None
    try:
        try:
            listener = Listener(sock.family, sock.type, sock.proto, fileno=sock.fileno())
            if listener.gettimeout() != sock.gettimeout():  # it would set the mode, which others may share
                listener.settimeout(sock.gettimeout())
        except (OSError, ValueError):
            if sock.fileno() >= 0:
                raise
        yield listener
    finally:
        if listener is not None:
            if sock.fileno() == listener.fileno():
                listener.detach()
            else:  # closed meanwhile: the number may be somebody else's by now
                _StandardSocket.detach(listener)


# --- threads at exit ------------------------------------------------------------------------------

_with_threads: weakref.WeakSet[AcceptMixIn] = weakref.WeakSet()


def _let_threads_end() -> None:
    """At exit: an idle thread, unless it is a daemon, would keep the process alive without reason.

    The original has threads only for clients, and a process lives until they are done, or as long as
    serve_forever() is in a thread that is no daemon.
    """
    for server in list(_with_threads):
        with _states:
            if server._listener is not None and all(thread.daemon for thread in server._serving):
                server._listener.stop()


def _after_fork_in_child() -> None:
    """The thread that held the lock is not there."""
    global _states
    _states = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

# atexit would be too late: it comes after the threads were joined.
threading._register_atexit(_let_threads_end)  # type: ignore[attr-defined]


# --- the original's classes, with the loop ----------------------------------------------------------
# Each comes from the original of the same name, and from the class here that its base has become.  They go by
# the original's names in repr() too.


class TCPServer(AcceptMixIn, _original.TCPServer):
    """As the original; `socket` is a Listener."""

    __module__ = _original.__name__

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Any,  # noqa: N803
        bind_and_activate: bool = True,
    ) -> None:
        super().__init__(server_address, RequestHandlerClass, False)
        sock = self.socket
        if type(sock) is _StandardSocket and sock.type == _socket.SOCK_STREAM:
            self.socket = Listener(sock.family, sock.type, sock.proto, fileno=sock.fileno())
            sock.detach()
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self.server_close()
                raise


class UDPServer(_original.UDPServer, TCPServer):
    """As the original."""

    __module__ = _original.__name__


class ThreadingTCPServer(_original.ThreadingTCPServer, TCPServer):
    """As the original, with threads that are kept."""

    __module__ = _original.__name__


class ThreadingUDPServer(_original.ThreadingUDPServer, UDPServer):
    """As the original."""

    __module__ = _original.__name__


if hasattr(_original, "UnixStreamServer"):

    class UnixStreamServer(_original.UnixStreamServer, TCPServer):
        """As the original; `socket` is a Listener."""

        __module__ = _original.__name__

    class UnixDatagramServer(_original.UnixDatagramServer, UDPServer):
        """As the original."""

        __module__ = _original.__name__

    class ThreadingUnixStreamServer(_original.ThreadingUnixStreamServer, UnixStreamServer):
        """As the original, with threads that are kept."""

        __module__ = _original.__name__

    class ThreadingUnixDatagramServer(_original.ThreadingUnixDatagramServer, UnixDatagramServer):
        """As the original."""

        __module__ = _original.__name__


if hasattr(_original, "ForkingMixIn"):

    class ForkingTCPServer(_original.ForkingTCPServer, TCPServer):
        """As the original."""

        __module__ = _original.__name__

    class ForkingUDPServer(_original.ForkingUDPServer, UDPServer):
        """As the original."""

        __module__ = _original.__name__

    if sys.version_info >= (3, 12):

        class ForkingUnixStreamServer(_original.ForkingUnixStreamServer, UnixStreamServer):
            """As the original."""

            __module__ = _original.__name__

        class ForkingUnixDatagramServer(_original.ForkingUnixDatagramServer, UnixDatagramServer):
            """As the original."""

            __module__ = _original.__name__


if TYPE_CHECKING:  # last: what is defined above is not the original's
    from socketserver import *  # type: ignore[assignment]  # noqa: F403
