"""What a test may need of the system, and the marks that skip it where that is missing.

What a program of a test imports lies here too, and there are thousands of those: what takes long to import
is imported where it is used.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from helpers.addresses import NOBODYS

if TYPE_CHECKING:
    import pytest

# Descriptors, and places in a listener's queue, for a test with two thousand clients.
THOUSANDS = 2500


def which(command: str, path: str | None = None) -> str | None:
    import shutil

    return shutil.which(command, path=path)


def has_free_threads() -> bool:
    import sysconfig

    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def errors_of(*command: str) -> str:
    """Return what a command that is asked about itself writes on standard error."""
    import subprocess

    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stderr


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
    if sys.platform != "win32":
        return False
    import ctypes

    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


def sanitized() -> bool:
    """Tell whether AddressSanitizer is there: it calls much of libc itself, and keeps what is freed."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


@functools.cache
def inetd() -> str | None:
    """Return OpenBSD's inetd, if this process may run it; others have other options."""
    if os.name != "posix" or os.geteuid() != 0:
        return None
    found = which("inetd", path="/usr/sbin:/usr/local/sbin")  # it is in no ordinary user's path
    if found is None:
        return None
    return found if "[-dEil]" in errors_of(found, "-?") else None


def nginx() -> str | None:
    """Return nginx, which is in no ordinary user's path."""
    return which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def haproxy() -> str | None:
    """Return HAProxy, which is in no ordinary user's path."""
    return which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@functools.cache
def nginx_stream() -> tuple[str, str] | None:
    """Return nginx, and the line of a configuration that loads its stream module, "" where that is in it."""
    program = nginx()
    if program is None:
        return None
    built = errors_of(program, "-V")
    if "--with-stream " in built:
        return program, ""
    words = [word.partition("=") for word in built.split()]
    folders = [folder for name, _, folder in words if name == "--modules-path"]
    modules = [os.path.join(folder, "ngx_stream_module.so") for folder in folders]
    found = [module for module in modules if os.path.exists(module)]
    return (program, f"load_module {found[0]};") if found else None


@functools.cache
def traces() -> bool:
    """Tell whether bpftrace works here: it needs root, and a kernel that lets it."""
    import subprocess

    if which("bpftrace") is None:
        return False
    command = ["bpftrace", "-e", "BEGIN { exit(); }"]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0


# What a test may need of the system, by the name that its skip shows.
PROBES: dict[str, Callable[[], bool]] = {
    "Linux": lambda: sys.platform == "linux",
    "the IPv6 loopback address": has_ipv6,
    "unix sockets": lambda: hasattr(socket, "AF_UNIX"),
    "fork": lambda: hasattr(os, "fork"),
    "signals between processes": lambda: os.name == "posix",
    "SO_REUSEPORT": lambda: hasattr(socket, "SO_REUSEPORT"),
    "TCP_INFO of a listener": tells_the_queue,
    "the openssl command": lambda: which("openssl") is not None,
    "systemd-socket-activate (Debian's package systemd)": lambda: bool(which("systemd-socket-activate")),
    "inetd (Debian's package openbsd-inetd), and root for it": lambda: inetd() is not None,
    "the curl command": lambda: which("curl") is not None,
    "the sslscan command": lambda: which("sslscan") is not None,
    "the slowhttptest command": lambda: which("slowhttptest") is not None,
    "the promtool command": lambda: which("promtool") is not None,
    "nginx": lambda: nginx() is not None,
    "nginx with its stream module": lambda: nginx_stream() is not None,
    "haproxy": lambda: haproxy() is not None,
    "a free-threaded interpreter": has_free_threads,
    "2,500 descriptors": has_descriptors,
    "a backlog of 2,500": has_backlog,
    "addresses of others that cannot be bound": nobodys_fails,
    "names of services": knows_services,
    "calls that go to libc": lambda: not sanitized(),
    "the gdb command": lambda: which("gdb") is not None,
    "bpftrace, and leave to use it": traces,
    "a C compiler": lambda: which(compiler()) is not None,
}


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test that is skipped, by name, where the system lacks one of PROBES."""
    import pytest

    missing = [name for name in names if not PROBES[name]()]
    return pytest.mark.skipif(bool(missing), reason="needs " + " and ".join(missing or names))


def posix_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test that has no meaning on Windows, with the reason."""
    import pytest

    return pytest.mark.skipif(os.name == "nt", reason=f"POSIX only: {reason}")


def not_under_wine(reason: str) -> pytest.MarkDecorator:
    """Mark a test that Wine cannot carry, with the reason; it runs on Windows itself."""
    import pytest

    return pytest.mark.skipif(under_wine(), reason=f"not under Wine: {reason}")
