"""Who or what holds an endpoint that cannot be bound."""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import os
import stat
import struct

from fastlisten import Endpoint
from fastlisten._endpoint import resolve
from fastlisten._unix_path import is_stale

PROC_LISTENING = "0A"  # TCP_LISTEN in include/net/tcp_states.h, as /proc/net/tcp writes it


def holder_of(endpoint: Endpoint) -> str | None:
    """Return the process that listens where endpoint cannot, as "name (process 123)".

    None where the system does not tell: this reads Linux's proc(5), and another user's processes
    do not show their sockets there.
    """
    try:
        inodes = _unix_inodes(endpoint) if not endpoint.port else _tcp_inodes(endpoint)
    except OSError:
        return None
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    for path in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(path) in links:
                process = path.split("/")[2]
                with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as comm:
                    return f"{comm.read().strip()} (process {process})"
        except OSError:
            continue  # it has ended, or is not ours to look into
    return None


def _tcp_inodes(endpoint: Endpoint) -> set[str]:
    ours = {ipaddress.ip_address(known.host.partition("%")[0] or "0.0.0.0") for known in resolve(endpoint)}
    everything = any(address.is_unspecified for address in ours)
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table, encoding="ascii") as lines:
            for columns in map(str.split, lines):
                if columns[3] != PROC_LISTENING:
                    continue
                address, _, port = columns[1].partition(":")
                theirs = _proc_address(address)
                clash = everything or theirs.is_unspecified or theirs in ours
                if clash and int(port, 16) == endpoint.port:
                    inodes.add(columns[9])
    return inodes


def _proc_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address of /proc/net/tcp: words of 32 bits, each one in the machine's order."""
    words = (text[start : start + 8] for start in range(0, len(text), 8))
    return ipaddress.ip_address(b"".join(struct.pack("=I", int(word, 16)) for word in words))


def _unix_inodes(endpoint: Endpoint) -> set[str]:
    path = endpoint.host.removeprefix("unix:")
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as lines:
        found = (line.rstrip("\n").split(maxsplit=7) for line in lines)
        return {columns[6] for columns in found if columns[7:] == [path]}


def what_stands_at(path: str) -> str | None:
    """Say what stands where a unix socket cannot be made; None where that is a socket in use, or unknown."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return "a directory is there"
        if not stat.S_ISSOCK(mode):
            return "a file that is no socket is there"
    except OSError:  # it is not ours to look at, or has gone
        return None
    if is_stale(path):
        return "a socket is there on which nobody listens any more: remove it, or use --replace-stale"
    return None
