"""What several test files use: sockets with time limits, conditions with deadlines, markers."""

import contextlib
import functools
import os
import shutil
import signal
import socket
import struct
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Long enough for a loaded machine, short enough that a hang is told by the test that caused it.
LIMIT = 10.0
# How often a condition is asked again; it is not a wait for something to have happened.
STEP = 0.002
# A name that no resolver knows and none is asked for: "!" is in no host name, and libc sees that itself.
NOWHERE = "no!such!host.invalid"
# An address of no machine, RFC 5737.
NOBODYS = "192.0.2.1"
# Descriptors, and places in a listener's queue, for a test with two thousand clients.
THOUSANDS = 2500


def wait_until(condition: Callable[[], Any], deadline: float = LIMIT, what: str = "") -> Any:
    """Ask `condition` until it is true, for at most `deadline` seconds, and return its value."""
    end = time.monotonic() + deadline
    pause = threading.Event()  # never set: its wait is interrupted by signals, unlike a busy loop
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not true within {deadline} s: {what or condition}")
        pause.wait(STEP)
    return value


def reachable(address: Any) -> Any:
    """Return the address a client connects to: the loopback one where a server has them all."""
    if isinstance(address, tuple) and address[0] in ("0.0.0.0", "::"):
        return ("::1" if ":" in address[0] else "127.0.0.1", *address[1:])
    return address


def connect(
    target: Any, timeout: float | None = LIMIT, *, source: Any = None, receive_buffer: int = 0
) -> socket.socket:
    """Connect to a listener or an address, by plain system calls, and return the client's socket.

    `target` is a listening socket, `(host, port)` or a unix path. `timeout`, in seconds, is for
    the connecting and stays set on the socket. The caller closes it.
    """
    if isinstance(target, socket.socket):
        family, address = target.family, reachable(target.getsockname())
    elif isinstance(target, str | bytes):
        family, address = socket.AF_UNIX, target
    else:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        address = reachable(target)
    client = socket.socket(family, socket.SOCK_STREAM)
    try:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(timeout)
        if source is not None:
            client.bind(source)
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def reset(client: socket.socket) -> None:
    """Close a TCP socket so that its peer is sent RST in place of FIN."""
    # struct linger is two ints on POSIX and two shorts on Windows.
    linger = struct.pack("HH" if os.name == "nt" else "ii", 1, 0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()


def read_all(client: socket.socket, limit: int = 1 << 26) -> bytes:
    """Read until the peer ends its side and return what came, at most `limit` bytes."""
    parts, size = [], 0
    while size < limit and (part := client.recv(min(1 << 16, limit - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def exchange(target: Any, data: bytes = b"ping", timeout: float = LIMIT) -> bytes:
    """Connect, send `data`, end the sending side and return all that the server answers."""
    with connect(target, timeout) as client:
        if data:
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def refusal(target: Any) -> bytes | str:
    """Connect and return what the server tells a client that it refuses: bytes, or "reset"."""
    try:
        with connect(target) as client:
            # Wine reads a reset as an end; a client of the machine beneath does get the reset.
            return read_all(client) or ("reset" if under_wine() else b"")
    except ConnectionResetError:  # it can be quicker than the end of connect()
        return "reset"


def echo(connection: Any) -> None:
    """Send back all that comes until the client ends; a handler."""
    while data := connection.recv(1 << 16):
        connection.sendall(data)


@contextlib.contextmanager
def alarms(handler: Any, every: float) -> Iterator[None]:
    """Send a signal to this, the main thread every so many seconds, and have `handler` called.

    Until it raises: one more on the way out of the block would come out of whatever clears up there.
    """
    # Not SIGALRM: pytest-timeout's clock rings with that.
    number = signal.SIGUSR1
    quiet = False

    def answer(*arguments: Any) -> None:
        nonlocal quiet
        if quiet:
            return
        try:
            handler(*arguments)
        except BaseException:
            quiet = True
            raise

    before = signal.signal(number, answer)
    here, over = threading.get_ident(), threading.Event()

    def ring() -> None:
        while not quiet and not over.wait(every):
            signal.pthread_kill(here, number)

    ringing = threading.Thread(target=ring)
    ringing.start()
    try:
        yield
    finally:
        over.set()
        ringing.join()
        signal.signal(number, before)


class Serving:
    """A serve() that runs in a thread: its thread, and its result or error once it has ended."""

    def __init__(self, target: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._target = target
        self.thread = threading.Thread(target=self._run, name="serving")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._target()
        except BaseException as error:  # handed to whoever waits, see wait()
            self.error = error

    def wait(self, deadline: float = LIMIT) -> Any:
        """Wait for serve() to end by itself; return what it returned or raise what it raised."""
        self.thread.join(deadline)
        if self.thread.is_alive():
            raise AssertionError(f"serve() has not ended within {deadline} s")
        if self.error is not None:
            error, self.error = self.error, None  # the context manager does not raise it again
            raise error
        return self.result


@contextlib.contextmanager
def serving(listener: Any, handler: Any, **options: Any) -> Iterator[Serving]:
    """Run `listener.serve(handler, **options)` in a thread; stop and join it at the end.

    What serve raised comes out at the end, unless wait() has given it out before. The listener
    stays open: it is the caller's.
    """
    served = Serving(lambda: listener.serve(handler, **options))
    try:
        yield served
    finally:
        # A stop after the end would make a later serve() return at once, so ask first.
        if served.thread.is_alive():
            listener.stop()
            served.thread.join(LIMIT)
        if served.thread.is_alive():  # a handler waits for its client: cut it, then say so
            listener.stop(drain=0)
            served.thread.join(LIMIT)
            raise AssertionError("serve() did not end on stop(); its handlers had to be cut")
    served.wait(0)


def descriptor_table(pid: int) -> int:
    """Return for how many descriptors a process has room; proc_pid_status(5), FDSize."""
    with open(f"/proc/{pid}/status") as status:
        return int(status.read().split("FDSize:")[1].split()[0])


def has_ipv6() -> bool:
    """Tell whether ::1 can be bound; containers often have the family and not the address."""
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def own_loopback() -> str:
    """Return a loopback address that no other process's test binds a port of, where there is more than one.

    A port that was given back there can be bound again: nobody was given it in between.
    """
    if sys.platform not in ("linux", "win32"):
        return "127.0.0.1"
    # Wine counts its processes from the beginning, but binds its host's addresses.
    first, number = (64 if os.name == "posix" else 128), os.getpid()
    return f"127.{first + (number >> 16) % 64}.{number >> 8 & 255}.{number & 255}"


def has_descriptors() -> bool:
    """Tell whether a process may have so many as a test with thousands of clients needs."""
    if os.name != "posix":
        return False
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hard == resource.RLIM_INFINITY or hard >= THOUSANDS


def has_backlog() -> bool:
    """Tell whether thousands may wait in a listener's queue; listen(2): 128 before Linux 5.4."""
    try:
        with open("/proc/sys/net/core/somaxconn") as setting:
            return int(setting.read()) >= THOUSANDS
    except FileNotFoundError:
        return False


def nobodys_fails() -> bool:
    """Tell whether an address of no machine cannot be bound; ip(7), ip_nonlocal_bind."""
    with socket.socket() as probe:
        try:
            probe.bind((NOBODYS, 0))
        except OSError:
            return True
    return False


def knows_services() -> bool:
    """Tell whether ports have names: /etc/services, which Debian keeps in a package of its own, netbase."""
    try:
        return socket.getservbyname("http", "tcp") == 80
    except OSError:
        return False


@functools.cache
def tells_the_queue() -> bool:
    """Tell whether TCP_INFO describes a listener's queue: qemu's user mode gives four bytes and no more."""
    if sys.platform != "linux":
        return False
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return len(probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)) == 32


def compiler() -> str:
    """Return the command of the C compiler for the system that Python runs on."""
    return os.environ.get("CC", "cc")


def under_wine() -> bool:
    """Tell whether this is Windows Python on Wine."""
    if os.name != "nt":
        return False
    import ctypes

    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


# What a test may need of the system, by the name that its skip shows.
PROBES: dict[str, Callable[[], bool]] = {
    "Linux": lambda: sys.platform == "linux",
    "the IPv6 loopback address": has_ipv6,
    "unix sockets": lambda: hasattr(socket, "AF_UNIX"),
    "fork": lambda: hasattr(os, "fork"),
    "signals between processes": lambda: os.name == "posix",
    "SO_REUSEPORT": lambda: hasattr(socket, "SO_REUSEPORT"),
    "TCP_INFO of a listener": tells_the_queue,
    "the openssl command": lambda: shutil.which("openssl") is not None,
    "a free-threaded interpreter": lambda: bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "2,500 descriptors": has_descriptors,
    "a backlog of 2,500": has_backlog,
    "addresses of others that cannot be bound": nobodys_fails,
    "names of services": knows_services,
    "a C compiler": lambda: shutil.which(compiler()) is not None,
}


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test that is skipped, by name, where the system lacks one of PROBES."""
    missing = [name for name in names if not PROBES[name]()]
    return pytest.mark.skipif(bool(missing), reason="needs " + " and ".join(missing or names))


def posix_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test that has no meaning on Windows, with the reason."""
    return pytest.mark.skipif(os.name == "nt", reason=f"POSIX only: {reason}")


def not_under_wine(reason: str) -> pytest.MarkDecorator:
    """Mark a test that Wine cannot carry, with the reason; it runs on Windows itself."""
    return pytest.mark.skipif(under_wine(), reason=f"not under Wine: {reason}")


class Told(tuple[Any, ...]):
    """What an act gave: a value, or all that a caller can see of an exception."""

    __slots__ = ()


def told(act: Callable[..., Any], *arguments: Any) -> Told:
    """Run an act and describe its outcome so that two implementations can be compared.

    An exception is described by its class, errno, winerror, arguments, text and how it is
    chained; a value stands for itself. A socket that is returned is closed.
    """
    try:
        value = act(*arguments)
    except Exception as error:
        return Told(
            (
                type(error),
                getattr(error, "errno", "none"),
                getattr(error, "winerror", "none"),
                error.args,
                str(error),
                type(error.__cause__),
                error.__suppress_context__,
            )
        )
    if isinstance(value, socket.socket):
        value.close()
        return Told(("a socket",))
    return Told(("value", value))
