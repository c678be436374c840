"""Fixtures of the whole suite; what tests import is in helpers/."""

import contextlib
import gc
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from fastlisten import Listener, bind

pytest.register_assert_rewrite("helpers")  # before it is imported: what a helper asserts is told in full

from helpers import LOOPBACK, PROBES, THOUSANDS, connect, wait_until
from helpers.fuzzing import Fuzz
from helpers.pairs import pair
from helpers.serve import Queued

# Threads that a test has stopped may still be in their last instructions when it ends.
ENDING = 3.0

hypothesis.settings.register_profile(
    "fastlisten",
    deadline=None,  # real sockets: one slow example says nothing
    max_examples=50,
    print_blob=True,
)
hypothesis.settings.load_profile("fastlisten")


FUZZED = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=float,
        default=0,
        metavar="SECONDS",
        help="how long each test of random programs goes on, with other ones each time",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give the tests that --fuzz makes longer their time, and that to find the smallest example."""
    seconds = config.getoption("--fuzz")
    for item in items:
        if seconds and "fuzz" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(seconds + 600), append=False)


def pytest_collection_finish() -> None:
    """Have the garbage collector leave out what is there before the first test: much, and no garbage."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, count in config.stash.get(FUZZED, {}).items():
        terminalreporter.line(f"{name}: {count} examples")


@pytest.hookimpl(trylast=True)  # by now pytest knows whether its own output has colours
def pytest_configure() -> None:
    """Give the processes that tests start what they would have by themselves, whoever runs the tests.

    A shell's background job begins with SIGINT ignored, nohup's with SIGHUP, and they pass that on. Tests
    read what processes print: that has no colours, and no options that were meant for this pytest.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name in ("FORCE_COLOR", "PYTHON_COLORS", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)
    os.environ["NO_COLOR"] = "1"


def open_descriptors() -> dict[int, str]:
    """Return the open descriptors and what they name; empty where they cannot be listed.

    Windows has no list of a process's sockets, only a count of all kernel handles, which moves
    with threads, events and Wine's own: there the threads alone are counted. (Wine's drive Z: shows
    the folders below, of Wine's own server.)
    """
    if os.name != "posix":
        return {}
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = {}
    for name in os.listdir(folder):
        try:
            found[int(name)] = os.readlink(f"{folder}/{name}") if "proc" in folder else ""
        except OSError:  # the descriptor of the listing itself
            continue
    return found


def running_threads() -> list[str]:
    """Return the threads: all of the kernel's where it lists them, so that C ones count too."""
    try:
        return sorted(os.listdir("/proc/self/task"))
    except OSError:
        return sorted(str(thread.ident) for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Fail the test that ends with other descriptors, or with more threads, than it began with."""
    descriptors, threads = open_descriptors(), running_threads()

    def settled() -> bool:
        # Fewer descriptors are a fault too: somebody's was closed. Fewer threads are not.
        return len(open_descriptors()) == len(descriptors) and len(running_threads()) <= len(threads)

    yield
    if settled():
        return
    gc.collect()  # an open socket in a cycle now warns, and the warning is an error
    with contextlib.suppress(AssertionError):  # told below, with the names
        wait_until(settled, ENDING)
    if settled():
        return
    after = open_descriptors()
    changed = {n: t for n, t in after.items() if descriptors.get(n) != t}
    names = [thread.name for thread in threading.enumerate()]
    pytest.fail(
        f"descriptors {len(descriptors)} -> {len(after)}, of them new {changed}; "
        f"threads {len(threads)} -> {len(running_threads())}, Python's are {names}",
        pytrace=False,
    )


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Iterator[Fuzz]:
    """Give what runs a random test, for as long as --fuzz says; how many examples it ran is told then."""
    fuzz = Fuzz(request.config.getoption("--fuzz"))
    yield fuzz
    if fuzz.seconds:
        request.config.stash.setdefault(FUZZED, {})[request.node.nodeid] = fuzz.count


@pytest.fixture
def thousands() -> Iterator[None]:
    """Give this process and those that it starts 2,500 descriptors and more."""
    if not PROBES["2,500 descriptors"]():
        pytest.skip("needs 2,500 descriptors")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < THOUSANDS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (THOUSANDS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def unix_paths() -> Iterator[Path]:
    """Give a folder for unix sockets; pytest's own can be too long for sun_path (108 bytes)."""
    folder = tempfile.mkdtemp(prefix="fl-")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def unix_path(unix_paths: Path) -> str:
    """Give a free path for one unix socket."""
    return str(unix_paths / "s")


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give processes whose socket calls fail as planned; see helpers/faults.py."""
    for name in ("Linux", "a C compiler"):
        if not PROBES[name]():
            pytest.skip(f"needs {name}, for the library that injects faults")
    from helpers import faults  # not above: few tests have a need of it

    return faults.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Give a Listener on the loopback address, closed at the end."""
    with bind(LOOPBACK) as listener:
        yield listener


@pytest.fixture
def queued() -> Iterator[Queued]:
    """Give a function that connects `n` clients, each sends its number; all are closed at the end."""
    with contextlib.ExitStack() as clients:

        def some(target: Any, n: int, first: int = 0) -> list[socket.socket]:
            made = [clients.enter_context(connect(target)) for _ in range(n)]
            for number, client in enumerate(made, first):
                client.sendall(b"%d" % number)
            return made

        yield some


@pytest.fixture
def accepted_pair() -> Iterator[tuple[Any, socket.socket]]:
    """Give a Connection and its client; both are closed at the end."""
    with pair("ours") as accepted_pair:
        yield accepted_pair


@pytest.fixture
def connection(accepted_pair: tuple[Any, socket.socket]) -> Any:
    """Give a Connection; its client is the fixture `client`."""
    return accepted_pair[0]


@pytest.fixture
def client(accepted_pair: tuple[Any, socket.socket]) -> socket.socket:
    """Give the client of the fixture `connection`."""
    return accepted_pair[1]


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the TLS context of a server for localhost and that of a client that trusts it."""
    from helpers import certificates  # not above: ssl is slow to import

    return certificates.tls_contexts(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session", name="pair")
def localhost_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the files of a certificate for localhost and of its key."""
    if not PROBES["the openssl command"]():
        pytest.skip("needs the openssl command")
    from helpers import certificates

    return certificates.certificate(tmp_path_factory.mktemp("pair"))
