"""Sockets that another program has opened for this one: systemd's, by LISTEN_FDS, and inetd's descriptor 0.

What somebody else made is left as it is: it is not listened on again, nor shut down, and no path is unlinked.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from typing import TYPE_CHECKING

from fastlisten._core.accept import connection_on
from fastlisten._endpoint import SYSTEMD, Endpoint
from fastlisten._listener import Listener, ServeResult, handler_of

if TYPE_CHECKING:
    from fastlisten._listener import Handler
    from fastlisten._options import Checked

__all__ = ["inherited"]

FIRST = 3  # the descriptor that comes first; SD_LISTEN_FDS_START of sd_listen_fds(3)

# What says which descriptors were passed, for which process, and by which names.
VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID")

UNNAMED = "unknown"  # so sd_listen_fds_with_names() calls a descriptor that was passed without a name

# What was passed and nobody has taken yet: names by descriptors.
_passed: dict[int, str] = {}
_lock = threading.RLock()  # re-entrant: a signal handler may bind, too


class InheritedListener(Listener):
    """A Listener on a socket that listened before: its queue is its maker's to size."""

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens.  A server that is given a socket calls this, with a backlog of its own."""


def inherited() -> list[Listener]:
    """Take all listening sockets that systemd, or who does as it does, has passed to this process.

    Returns them in their order, the caller's to close; none if none were passed to this process, or all
    were taken.  The descriptors are those that LISTEN_FDS counts, from 3 on, if LISTEN_PID says this process,
    and LISTEN_PIDFDID too where it is set; sd_listen_fds(3).  They become close-on-exec, and the variables
    are unset, so that children do not take them for theirs; bind("systemd:NAME") knows of them as before.

    Raises ValueError for variables that cannot be read and for a socket that is not a stream socket; OSError
    for a descriptor that is closed (EBADF), no socket (ENOTSOCK), a client's connection (EISCONN) or not
    listening (EINVAL).  Then nothing is taken.

    >>> import fastlisten
    >>> fastlisten.inherited()
    []
    """
    with _lock:
        _receive()
        for number, name in _passed.items():
            if not _listens(number, f"{SYSTEMD}{name}"):
                raise _connected(f"{SYSTEMD}{name}")
        taken: list[Listener] = [InheritedListener(fileno=number) for number in _passed]
        _passed.clear()
    return taken


def bind_inherited(where: Endpoint, settings: list[tuple[str, int, int, int]], options: Checked) -> Listener:
    """bind() of a systemd: or inetd: endpoint, with options for setsockopt(); the Listener is the caller's.

    Raises what inherited() raises; FileNotFoundError when no such socket was passed, and ValueError when
    several were, each with the names that there are.
    """
    if options.reuse_port or options.exclusive or options.dualstack_ipv6:
        raise ValueError(f"{where} is bound already")
    if options.backlog is not None:
        raise ValueError(f"backlog: {where} listens already, with that of its maker")
    with _lock:
        number = _find(where)
        if not _listens(number, str(where)):
            raise _connected(str(where))
        sock = socket.socket(fileno=number)
        try:
            for _, level, option, value in settings:
                sock.setsockopt(level, option, value)
        finally:
            sock.detach()  # if that has failed it stays where it was
        return InheritedListener(fileno=_take(number))


def connection_at(where: Endpoint) -> socket.socket | None:
    """Take the client's connection that was passed in place of a listening socket; None if that is one.

    inetd does so for a service of its `nowait` kind, systemd for a socket unit with Accept=yes.
    Raises what bind_inherited() raises.  The caller closes it.
    """
    with _lock:
        number = _find(where)
        if _listens(number, str(where)):
            return None
        client = socket.socket(fileno=_take(number))
    client.settimeout(socket.getdefaulttimeout())  # as an accepted one; it may have come non-blocking
    return client


def serve_connection(client: socket.socket, handler: Handler, options: Checked) -> ServeResult:
    """Hand this one client to the handler, as Listener.serve() does; it is closed at the end.

    Raises what ends a serve(): KeyboardInterrupt and SystemExit.  What the handler raises otherwise goes to
    `on_error`, or to the log.  ValueError with proxy= and admission=, which are for listening sockets.
    """
    if options.proxy is not None or options.admission is not None:
        client.close()
        name = "admission" if options.proxy is None else "proxy"
        raise ValueError(f"{name} is for listening sockets, and this is a client's connection")
    handle, on_error = handler_of(handler, options)
    with connection_on(client) as connection:
        try:
            handle(connection)
        except Exception as error:
            if on_error is None:
                extra = {"event": "handler failed", "connection": connection}
                log = logging.getLogger("fastlisten")
                log.error("the handler of %r failed", connection, exc_info=error, extra=extra)
            else:
                on_error(error, connection)
    return ServeResult(finished=0, cut=0)


# --- which descriptors ------------------------------------------------------------------------------------


def _find(where: Endpoint) -> int:
    """The descriptor that an endpoint means; it is not yet taken."""
    if not where.host.startswith(SYSTEMD):
        return 0  # inetd(8)
    _receive()
    name = where.host[len(SYSTEMD) :]
    found = [number for number, other in _passed.items() if name in ("", other)]
    if not found:
        raise FileNotFoundError(errno.ENOENT, _why_none(name))
    if len(found) > 1:
        names = ", ".join(repr(_passed[number]) for number in found)
        raise ValueError(f"{where} means {len(found)} sockets, and one is taken by its name: {names}")
    return found[0]


def _receive() -> None:
    """Note what was passed to this process, if the environment tells of something.

    In sd_listen_fds()'s order; after that the variables are gone, so that it happens once.
    """
    if not _is_ours():
        return
    count = _number("LISTEN_FDS")
    if count < 1:
        raise ValueError(f"LISTEN_FDS must be at least 1, not {count}")
    text = os.environ.get("LISTEN_FDNAMES")
    names = None if text is None else text.split(":")
    if names is not None and len(names) != count:
        raise ValueError(f"LISTEN_FDNAMES {text!r} has {len(names)} names for {count} descriptors")
    for number in range(FIRST, FIRST + count):
        try:
            os.set_inheritable(number, False)
        except OSError as error:
            reason = f"{error.strerror}: LISTEN_FDS says {count}, and descriptor {number} is closed"
            raise OSError(error.errno, reason) from None
    _passed.update(zip(range(FIRST, FIRST + count), names or [UNNAMED] * count, strict=True))
    for variable in VARIABLES:
        os.environ.pop(variable, None)


def _is_ours() -> bool:
    """Whether descriptors were passed, and to this process: the variables go to its children, too."""
    if "LISTEN_FDS" not in os.environ or "LISTEN_PID" not in os.environ:
        return False
    if _number("LISTEN_PID") != os.getpid():
        return False
    if "LISTEN_PIDFDID" not in os.environ:
        return True
    own = _pidfd_inode()
    return own is None or own == _number("LISTEN_PIDFDID")


def _pidfd_inode() -> int | None:
    """What tells this process from an earlier one of the same number; None where that is not to be had.

    It is the inode of a descriptor for the process; pidfd_open(2), since Linux 6.9.
    """
    try:
        descriptor = os.pidfd_open(os.getpid())  # type: ignore[attr-defined,unused-ignore]
    except (AttributeError, OSError):
        return None
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise ValueError(f"{variable} must be a number, not {text!r}")
    return int(text)


def _why_none(name: str) -> str:
    """Why there is no socket of this name, "" for any."""
    if _passed:
        return f"no socket {name!r} was passed: there are {', '.join(map(repr, _passed.values()))}"
    pid = os.environ.get("LISTEN_PID")
    if "LISTEN_FDS" in os.environ and pid is not None:
        return f"the sockets are for process {pid}, as LISTEN_PID says, and this is {os.getpid()}"
    return "no socket was passed to this process, or each was taken before: LISTEN_FDS is not set"


# --- what they are ----------------------------------------------------------------------------------------


def _listens(number: int, where: str) -> bool:
    """Whether this descriptor is a listening socket; if not, it is a connection.  It stays its owner's.

    Raises ValueError for what is no stream socket, OSError for what is neither.
    """
    sock = _socket(number, where)
    try:
        if sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{where} is not a stream socket: descriptor {number} is {_type(sock)}")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return True
        try:
            sock.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return False  # a client that has sent a reset meanwhile, which accept() gives, too
            text = f"{where} is not listening: descriptor {number} is neither set to listen nor connected"
            raise OSError(errno.EINVAL, text) from None
        return False
    finally:
        sock.detach()


def _socket(number: int, where: str) -> socket.socket:
    try:
        return socket.socket(fileno=number)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {where} is descriptor {number}") from None


def _type(sock: socket.socket) -> str:
    return getattr(sock.type, "name", str(sock.type))


def _connected(where: str) -> OSError:
    text = f"{where} is a client's connection, not a listening socket: fastlisten.serve() serves it"
    return OSError(errno.EISCONN, text)


def _take(number: int) -> int:
    """Give a descriptor away; returns where it is."""
    if number in _passed:
        del _passed[number]
        return number
    return _take_standard_streams()


def _take_standard_streams() -> int:
    """Move inetd's socket from descriptor 0 to one of its own, close-on-exec.

    inetd has it as 1 and 2 as well.  They lead nowhere from then on: what a handler, or a child of it, prints
    or logs there must not reach a client.
    """
    import fcntl  # where there is inetd

    taken: int = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, FIRST)
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            for number in range(FIRST):
                if _same_file(number, taken):
                    os.dup2(nowhere, number)
        finally:
            os.close(nowhere)
    except BaseException:
        os.close(taken)
        raise
    return taken


def _same_file(number: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(number, other)
    except OSError:  # it is closed
        return False


def _after_fork_in_child() -> None:
    """The thread that held the lock is not there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
