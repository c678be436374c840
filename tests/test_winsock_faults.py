"""The error table's Winsock codes, each really returned by accept(); test_faults.py has the POSIX ones."""

import ctypes
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastlisten
from helpers import LIMIT, LOOPBACK, connect, echo, exchange, serving, wait_until

pytestmark = pytest.mark.skipif(os.name != "nt", reason="Windows only: its codes")

MODES: dict[str, dict[str, Any]] = {
    "inline": {},
    "threads": {"threads": 2},
    "busy": {"busy": "reset", "pending": 10},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())

# winsock2.h and winerror.h
WOULD_BLOCK, INTERRUPTED, ABORTED = 10035, 10004, 995
THIS_CONNECTION_ONLY = [
    *[10053, 10054, 64],  # WSAECONNABORTED, WSAECONNRESET, ERROR_NETNAME_DELETED
    *[10042, 10043, 10044],  # WSAENOPROTOOPT, WSAEPROTONOSUPPORT, WSAESOCKTNOSUPPORT
    *[10050, 10051, 10064, 10065, 10060],  # WSAENETDOWN, -NETUNREACH, -HOSTDOWN, -HOSTUNREACH, -TIMEDOUT
    10057,  # WSAENOTCONN, as Wine says for a client that has reset
]
OUT_OF_RESOURCES = [10024, 10055, 8]  # WSAEMFILE, WSAENOBUFS, WSA_NOT_ENOUGH_MEMORY
CLOSED = [10009, 10022, 10038]  # WSAEBADF, WSAEINVAL, WSAENOTSOCK
UNKNOWN = [10045, 10013, 10014, 10047]  # WSAEOPNOTSUPP, WSAEACCES, WSAEFAULT, WSAEAFNOSUPPORT


def imports_of(module: Any, function: int) -> list[int]:
    """Return where a loaded module keeps the address `function` that it calls.

    PE Format, "The .idata Section": the import address table, through which every call of
    another library goes.
    """
    kernel32 = ctypes.WinDLL("kernel32")
    kernel32.GetModuleHandleW.restype = ctypes.c_size_t
    base = kernel32.GetModuleHandleW(module.__file__)
    assert base

    def number(at: int, kind: Any = ctypes.c_uint32) -> int:
        return int(kind.from_address(at).value)

    optional = base + number(base + 0x3C) + 24
    descriptor = base + number(optional + 112 + 8)  # the second data directory of a 64-bit image
    found = []
    while table := number(descriptor + 16):
        slot = base + table
        while address := number(slot, ctypes.c_uint64):
            if address == function:
                found.append(slot)
            slot += 8
        descriptor += 20
    return found


@pytest.fixture
def accepts_fail() -> Iterator[Callable[[int, int], None]]:
    """Give a function that makes the next accepts of fastlisten's modules fail: (code, how often)."""
    winsock = ctypes.WinDLL("ws2_32", use_last_error=True)
    signature = ctypes.WINFUNCTYPE(
        ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, use_last_error=True
    )
    real = signature(("accept", winsock))
    left, code = 0, 0

    def accept(listener: int, address: int, length: int) -> Any:
        nonlocal left
        if left == 0:
            return real(listener, address, length)
        left -= 1
        ctypes.set_last_error(code)
        return -1

    def plan(given: int, count: int) -> None:
        nonlocal left, code
        left, code = count, given

    ours = signature(accept)
    before, after = (ctypes.cast(f, ctypes.c_void_p).value for f in (real, ours))
    modules = [module for name, module in sys.modules.items() if name.startswith("fastlisten._")]
    slots = [
        slot
        for module in modules
        if str(module.__file__).endswith(".pyd")
        for slot in imports_of(module, before or 0)
    ]
    assert slots

    def write(value: Any) -> None:
        for slot in slots:
            old = ctypes.c_uint32()
            protect = ctypes.WinDLL("kernel32").VirtualProtect
            writable = protect(ctypes.c_void_p(slot), ctypes.c_size_t(8), 4, ctypes.byref(old))
            assert writable
            ctypes.c_uint64.from_address(slot).value = value

    write(after)
    try:
        yield plan
    finally:
        write(before)


def name_of(code: int) -> str:
    return errno.errorcode.get(code, str(code))


@modes
@pytest.mark.parametrize("code", [WOULD_BLOCK, INTERRUPTED, ABORTED])
def test_again_and_interrupted_are_no_errors(accepts_fail: Any, mode: Any, code: int) -> None:
    with fastlisten.bind(LOOPBACK) as listener:
        accepts_fail(code, 3)
        with serving(listener, echo, **mode):
            assert [exchange(listener) for _ in range(3)] == [b"ping"] * 3
        assert dict(listener.stats().accept_errors) == {}


@modes
@pytest.mark.parametrize("code", THIS_CONNECTION_ONLY)
def test_this_connection_only_is_counted_and_passed_by(accepts_fail: Any, mode: Any, code: int) -> None:
    with fastlisten.bind(LOOPBACK) as listener:
        accepts_fail(code, 3)
        with serving(listener, echo, **mode):
            assert [exchange(listener) for _ in range(3)] == [b"ping"] * 3
        assert dict(listener.stats().accept_errors) == {name_of(code): 3}


@modes
@pytest.mark.parametrize("code", OUT_OF_RESOURCES)
def test_out_of_resources_pauses_and_tells(
    accepts_fail: Any, mode: Any, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastlisten")
    with fastlisten.bind(LOOPBACK) as listener:
        accepts_fail(code, 3)
        with serving(listener, echo, **mode):
            assert [exchange(listener) for _ in range(3)] == [b"ping"] * 3
            wait_until(lambda: len(caplog.records) > 1)
        assert dict(listener.stats().accept_errors) == {name_of(code): 3}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@modes
@pytest.mark.parametrize("code", [*CLOSED, *UNKNOWN])
def test_what_is_not_known_or_no_listener_is_raised_at_once(accepts_fail: Any, mode: Any, code: int) -> None:
    with fastlisten.bind(LOOPBACK) as listener, connect(listener) as client:  # so that accept is called
        accepts_fail(code, 1)
        with pytest.raises(OSError, match=rf"\[WinError {code}\]"):
            listener.serve(echo, **mode)
        with serving(listener, echo, **mode):
            client.sendall(b"hello")
            client.shutdown(1)
            assert client.recv(10) == b"hello"
            assert exchange(listener, b"again") == b"again"


@pytest.mark.parametrize("code", CLOSED)
def test_a_listener_that_is_gone_after_a_stop_ends_the_loop(accepts_fail: Any, code: int) -> None:
    def handler(_: Any) -> None:
        accepts_fail(code, 1000)
        listener.stop(drain=LIMIT)

    with (
        fastlisten.bind(LOOPBACK) as listener,
        serving(listener, handler, threads=1) as served,
        connect(listener) as client,
    ):
        assert client.recv(1) == b""
        assert tuple(served.wait()) == (1, 0)
        accepts_fail(0, 0)
