"""Accepts that fail, each fault really happening: the error table, and running out of things."""

import contextlib
import errno
import re
import select
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from preload import Faults, Plan, plain_environment, python, server
from support import LIMIT, connect, exchange, needs, refusal, wait_until

pytestmark = needs("Linux", "a C compiler")

MODES: dict[str, dict[str, Any]] = {
    "inline": {},
    "threads": {"threads": 2},
    "growing threads": {"threads": (1, 4)},
    "busy": {"busy": "reset", "pending": 10},
    "busy threads": {"busy": b"full", "pending": 10, "threads": 2},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())

# --- the table of DESIGN.md, line by line

AGAIN = ["EAGAIN", "EWOULDBLOCK"]
THIS_CONNECTION_ONLY = [
    *["ECONNABORTED", "EPROTO", "ENOPROTOOPT", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN"],
    *["EHOSTUNREACH", "ENONET", "EPERM", "ETIMEDOUT", "ENOSR", "ESOCKTNOSUPPORT"],
    *["EPROTONOSUPPORT"],
]
OUT_OF_RESOURCES = ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"]
CLOSED = ["EBADF", "EINVAL", "ENOTSOCK"]
# Some of all the others, errors of other calls among them.
UNKNOWN = ["EOPNOTSUPP", "EFAULT", "EIO", "ECONNRESET", "EACCES", "ENOSYS", "EPIPE"]

TABLE = """
import ast, json, logging, sys, fastlisten
from preload import change_plan
from server import Records
from support import connect, echo, exchange, serving, told, wait_until

records = Records()
logging.getLogger("fastlisten").addHandler(records)
logging.getLogger("fastlisten").setLevel(logging.INFO)
logging.getLogger("fastlisten").propagate = False
options, served, raised = map(ast.literal_eval, sys.argv[1:])
found = {}
for code in served:
    records.kept.clear()
    with fastlisten.bind(("127.0.0.1", 0)) as listener:
        change_plan(accept=[(code, 3), (0, 1), (code, 2)])
        with serving(listener, echo, **options):
            answers = [exchange(listener, b"hello").decode() for _ in range(3)]
            if records.kept:  # the end of a shortage is told when accept has found nobody
                wait_until(lambda: len(records.kept) > 1)
        stats = listener.stats()
    found[code] = {"answers": answers, "errors": dict(stats.accept_errors),
        "logs": list(records.kept), "counts": [stats.accepted, stats.handled, stats.active]}
for code in raised:
    with fastlisten.bind(("127.0.0.1", 0)) as listener:
        # One client is queued, so that accept is called; it is served after the error came out.
        with connect(listener) as client:
            # without accept4() accept() is asked
            change_plan(accept=[(code, 2 if code == "ENOSYS" else 1)])
            first = told(lambda: listener.serve(echo, **options))
            with serving(listener, echo, **options):
                client.sendall(b"hello")
                client.shutdown(1)
                answers = [client.recv(10).decode(), exchange(listener, b"again").decode()]
    found[code] = [first[0].__name__, first[1], answers]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def table(request: pytest.FixtureRequest, faults: Faults) -> Any:
    """Serve three clients under each code in one process; what happened, by code.

    Each of the served codes comes three times before the first client, twice after it.
    """
    served = [*AGAIN, "EINTR", *THIS_CONNECTION_ONLY, *OUT_OF_RESOURCES]
    return faults.python(TABLE, repr(request.param), repr(served), repr([*UNKNOWN, *CLOSED]))


def all_are_served(found: Any) -> None:
    assert found["answers"] == ["hello"] * 3
    assert found["counts"] == [3, 3, 0]  # accepted, handled, active


@pytest.mark.parametrize("code", [*AGAIN, "EINTR"])
def test_again_and_interrupted_are_no_errors(table: Any, code: str) -> None:
    all_are_served(table[code])
    assert table[code]["errors"] == {}
    assert table[code]["logs"] == []


@pytest.mark.parametrize("code", THIS_CONNECTION_ONLY)
def test_this_connection_only_is_counted_and_passed_by(table: Any, code: str) -> None:
    all_are_served(table[code])
    assert table[code]["errors"] == {code: 5}
    assert table[code]["logs"] == []


@pytest.mark.parametrize("code", OUT_OF_RESOURCES)
def test_out_of_resources_is_logged_once_and_over_once(table: Any, code: str) -> None:
    """One episode: the client that got in between does not end it."""
    all_are_served(table[code])
    assert table[code]["errors"] == {code: 5}
    levels = [level for level, _ in table[code]["logs"]]
    assert levels == ["WARNING", "INFO"], table[code]["logs"]
    assert "5" in table[code]["logs"][1][1]  # how many tries it took


@pytest.mark.parametrize("code", [*UNKNOWN, *CLOSED])
def test_what_is_not_known_or_no_listener_is_raised_at_once(table: Any, code: str) -> None:
    """And the listener can be served again: nothing of the loop is left."""
    number = getattr(errno, code)
    assert table[code] == [type(OSError(number, "")).__name__, number, ["hello", "again"]]


WITHOUT_ACCEPT4 = """
import json, os, fastlisten
from support import connect
found = []
with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener), connect(listener):
    with listener.accept()[0] as blocking:
        found.append([os.get_inheritable(blocking.fileno()), os.get_blocking(blocking.fileno())])
    with listener.accept_many(1)[0] as other:
        found.append([os.get_inheritable(other.fileno()), os.get_blocking(other.fileno())])
    print(json.dumps([found, dict(listener.stats().accept_errors)]))
"""


def test_a_system_without_accept4_is_served_all_the_same(faults: Faults) -> None:
    """A seccomp filter or an emulator may be older than the call."""
    plan: Plan = [("ENOSYS", 1), (0, 1), ("ENOSYS", 1), (0, 1)]
    assert faults.python(WITHOUT_ACCEPT4, accept=plan) == [[[False, True], [False, True]], {}]


ERRORS_BY_CODE = """
import ast, json, sys, fastlisten
from support import echo, exchange, serving
with fastlisten.bind(("127.0.0.1", 0)) as listener, serving(listener, echo):
    exchange(listener)
    print(json.dumps(dict(listener.stats().accept_errors)))
"""


def test_errors_are_counted_by_code(faults: Faults) -> None:
    plan: Plan = [(code, 1 + i) for i, code in enumerate(THIS_CONNECTION_ONLY)]
    found = faults.python(ERRORS_BY_CODE, accept=plan)
    assert found == {code: 1 + i for i, code in enumerate(THIS_CONNECTION_ONLY)}


ENDS = """
import ast, json, sys, threading, fastlisten
from support import connect, serving
options = ast.literal_eval(sys.argv[1])
handled = []
def handler(connection):
    handled.append(connection.peer)
    listener.stop(drain=60)  # longer than served.wait() waits
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    with connect(listener), connect(listener), connect(listener):
        with serving(listener, handler, **options) as served:
            result = served.wait()
print(json.dumps([list(result), len(handled)]))
"""


# One thread: another would meet the fault before the first handler has called stop().
@pytest.mark.parametrize("mode", [{}, {"threads": 1}], ids=["inline", "thread"])
@pytest.mark.parametrize("code", CLOSED)
def test_a_listener_that_is_gone_after_a_stop_ends_the_loop(faults: Faults, mode: Any, code: str) -> None:
    """A drain that can take nobody any more is at its end: no error, and no wait for its time."""
    found = faults.python(ENDS, repr(mode), accept=[(0, 1), (code, 1000)])
    assert found == [[1, 0], 1]


NOT_A_LISTENER = """
import ast, json, socket, sys, fastlisten
from support import told
options = ast.literal_eval(sys.argv[1])
seen = []
for kind, bound in ((socket.SOCK_STREAM, True), (socket.SOCK_STREAM, False), (socket.SOCK_DGRAM, True)):
    with fastlisten.Listener(socket.AF_INET, kind) as listener:
        if bound:
            listener.bind(("127.0.0.1", 0))
        seen.append(told(lambda: listener.serve(print, **options))[1])
    seen.append(told(lambda: listener.serve(print, **options))[1])
print(json.dumps(seen))
"""


@modes
def test_what_is_no_listener_is_told_at_once(mode: Any) -> None:
    seen = python(NOT_A_LISTENER, repr(mode), environment=plain_environment())
    closed = errno.EBADF
    assert seen == [errno.EINVAL, closed, errno.EINVAL, closed, errno.EOPNOTSUPP, closed]


@pytest.mark.parametrize("mode", [{}, {"threads": 2}], ids=["inline", "threads"])
def test_a_failed_poll_is_raised(faults: Faults, mode: Any) -> None:
    code = """
import ast, json, sys, fastlisten
from support import told
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    print(json.dumps(told(lambda: listener.serve(print, **ast.literal_eval(sys.argv[1])))[1]))
"""
    # With threads the caller of serve() polls too; then either may meet the fault.
    assert faults.python(code, repr(mode), poll=[("ENOMEM", 1000)]) == errno.ENOMEM


# --- out of descriptors, for real


def waits(client: Any, seconds: float) -> None:
    """Assert that nothing comes for so long."""
    assert select.select([client], [], [], seconds)[0] == []


def answered(client: Any) -> float:
    """Wait for an answer and return when it came."""
    client.settimeout(LIMIT)
    assert client.recv(100) == b"hello"
    return time.monotonic()


def is_served(address: Any) -> bool:
    """Tell whether a client is served now, not refused."""
    with contextlib.suppress(ConnectionError):
        return exchange(address, b"again") == b"again"
    return False


def answered_after(process: Any, client: Any) -> float:
    """Have a server close a file, and return how long after that its client was answered."""
    freed = process.ask("free")
    return answered(client) - float(freed)


# Room for what the server itself needs: standard streams, listener, wake-ups, spare, clients.
NOFILE = 40


def spent_in_a_second(process: Any, client: Any) -> float:
    """Return the seconds of CPU that a server takes for one in which a client waits in vain."""
    begun = process.ask("cpu")
    waits(client, 1)
    return float(process.ask("cpu") - begun)


def logged(process: Any, *levels: str) -> None:
    """Check that just these were logged; a line may come a moment after what it tells of."""
    wait_until(lambda: len(process.ask("logs")) >= len(levels))
    assert tuple(level for level, _ in process.ask("logs")) == levels


def over(process: Any) -> str:
    """Return the line that was logged last, which tells that an episode is over."""
    return str(process.ask("logs")[-1][1])


@pytest.mark.parametrize("mode", ["inline", "threads", "busy threads"])
def test_no_descriptors_costs_nothing_and_ends_within_150_ms(mode: str) -> None:
    with server(nofile=NOFILE, **MODES[mode]) as process:
        assert exchange(process.address, b"first") == b"first"
        process.ask("fill")
        with connect(process.address) as client:
            client.sendall(b"hello")
            wait_until(lambda: process.ask("stats")["accept_errors"])
            begun = process.ask("cpu")
            waits(client, 3)
            spent = process.ask("cpu") - begun
            assert spent < 0.03, f"{spent:.3f} s of CPU in 3 s"
            logged(process, "WARNING")
            [(code, tries)] = process.ask("stats")["accept_errors"].items()
            assert code == "EMFILE"
            assert tries >= 20  # of 35: a busy machine is late, by half of the 100 ms if need be
            delays = [answered_after(process, client)]
        # With the last descriptor in use again the episode goes on; now it ends.
        process.ask("empty")
        assert exchange(process.address, b"last") == b"last"
        logged(process, "WARNING", "INFO")
        for _ in range(4):
            wait_until(lambda: process.ask("stats")["active"] == 0)  # a late close would make room
            process.ask("fill")
            with connect(process.address) as client:
                client.sendall(b"hello")
                waits(client, 0.3)  # by now the pause has its full length, 100 ms
                delays.append(answered_after(process, client))
            process.ask("empty")
            assert exchange(process.address, b"last") == b"last"
        assert statistics.median(delays) < 0.15, delays  # the machine may have held one up
        _, result = process.ask("stop")
        assert result[1] == 0  # cut; a handler may just have been at its end


@pytest.mark.parametrize(
    "mode",
    [{"threads": 4}, {"threads": (1, 4)}, {"threads": 4, "busy": "reset", "pending": 5}],
    ids=str,
)
def test_a_descriptor_of_ours_that_comes_free_is_used_at_once(mode: Any) -> None:
    with server(nofile=NOFILE, exhausted="a_minute", **mode) as process:
        for _ in range(3):
            with connect(process.address) as held:
                held.sendall(b"hello")
                answered(held)
                wait_until(lambda: process.ask("stats")["active"] == 1)  # the last round's are closed
                process.ask("fill")
                with connect(process.address) as late:
                    late.sendall(b"hello")
                    waits(late, 0.1)
                    held.close()
                    answered(late)  # the pause that this cuts short is longer than that waits
            process.ask("empty")


@pytest.mark.parametrize(
    ("code", "mode"),
    [("ENFILE", "inline"), ("ENOBUFS", "threads"), ("ENOMEM", "busy"), ("ENFILE", "busy threads")],
)
def test_the_same_for_what_the_whole_system_runs_out_of(
    faults: Faults, code: str, mode: str, tmp_path: Path
) -> None:
    switch = tmp_path / "while"
    environment = faults.environment(switch, accept=[(code, 1_000_000)])
    with server(environment=environment, **MODES[mode]) as process:
        assert exchange(process.address, b"first") == b"first"
        switch.touch()
        came = time.monotonic()
        with connect(process.address) as client:
            client.sendall(b"hello")
            wait_until(lambda: process.ask("stats")["accept_errors"])
            assert spent_in_a_second(process, client) < 0.01
            [(found, tries)] = process.ask("stats")["accept_errors"].items()
            assert found == code
            # 10, 20, 40, 80 ms and then one try in 100 ms, or later where the machine is busy
            assert 8 <= tries <= 5 + (time.monotonic() - came) / 0.1
            logged(process, "WARNING")
            switch.unlink()
            answered(client)
        assert exchange(process.address, b"last") == b"last"
        logged(process, "WARNING", "INFO")
        tries = process.ask("stats")["accept_errors"][code]
        line = re.fullmatch(r"accepting again after (\d+\.\d{3}) s and (\d+) failed tries", over(process))
        assert line, over(process)
        assert 1 <= float(line[1]) < time.monotonic() - came
        assert int(line[2]) == tries
        delays = []
        for _ in range(3):
            switch.touch()
            with connect(process.address) as client:
                client.sendall(b"hello")
                waits(client, 0.3)
                switch.unlink()
                freed = time.monotonic()
                delays.append(answered(client) - freed)
        assert statistics.median(delays) < 0.15, delays


WITHOUT_LOGGING = """
import ast, json, os, resource, socket, sys, threading, fastlisten

def out_of_descriptors():
    with socket.create_connection(address) as client:  # a thread, and whatever is made for the first client
        client.sendall(b"first")
        while client.recv(10):
            pass
    with socket.socket() as client:
        files = []
        try:
            while True:
                files.append(os.dup(0))
        except OSError:
            client.connect(address)
        while not listener.stats().accept_errors:
            pass
        for file in files:
            os.close(file)
        client.sendall(b"hello")
        answers.append(client.recv(10).decode())
    listener.stop()

assert "logging" not in sys.modules
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
listener, answers = fastlisten.bind("127.0.0.1:0"), []
address = listener.getsockname()
client = threading.Thread(target=out_of_descriptors)
client.start()
listener.serve(lambda connection: connection.sendall(connection.recv(10)), **ast.literal_eval(sys.argv[1]))
client.join()
listener.close()
print(json.dumps(answers))
"""


@modes
def test_what_is_logged_needs_no_import_when_descriptors_run_out(mode: Any) -> None:
    assert python(WITHOUT_LOGGING, repr(mode), environment=plain_environment()) == ["hello"]


@modes
@pytest.mark.parametrize("exhausted", ["pause", "shed"])
def test_clients_that_are_lost_without_end_make_it_pause(
    faults: Faults, mode: Any, exhausted: str, tmp_path: Path
) -> None:
    """An accept that is forbidden (EPERM, seccomp(2)) says of every client that it was lost."""
    while_file = tmp_path / "while"
    while_file.touch()
    environment = faults.environment(while_file, accept=[("EPERM", 1_000_000_000)])
    with server(environment=environment, exhausted=exhausted, **mode) as process:
        wait_until(lambda: process.ask("logs"))
        begun = process.ask("stats")["accept_errors"]["EPERM"]
        with connect(process.address) as client:
            waits(client, 1)
        # Tries between pauses of up to 100 ms; without pauses it would be a million.
        assert process.ask("stats")["accept_errors"]["EPERM"] - begun < 5_000
        while_file.unlink()
        wait_until(lambda: is_served(process.address))
        logged(process, "WARNING", "INFO")


@pytest.mark.parametrize("drain", ["", "0", "60"])
@modes
def test_stop_while_clients_are_lost_without_end(faults: Faults, mode: Any, drain: str) -> None:
    environment = faults.environment(accept=[("EPERM", 1_000_000_000)])
    with server(environment=environment, **mode) as process:
        wait_until(lambda: process.ask("stats")["accept_errors"])
        took, result = process.ask("stop", drain)
        assert result == [0, 0]
        assert took < LIMIT


A_DRAIN_FOR_NOBODY = """
import ast, json, sys, time, fastlisten
from preload import change_plan
from support import echo, serving, wait_until

with fastlisten.bind("unix:@" + sys.argv[1]) as listener:
    change_plan(accept=[("EMFILE", 1)])
    with serving(listener, echo, **ast.literal_eval(sys.argv[2])) as served:
        wait_until(lambda: listener.stats().accept_errors)
        begun = time.monotonic()
        listener.stop(drain=600)
        served.wait()
        print(json.dumps(time.monotonic() - begun))
"""


@modes
def test_a_drain_in_a_shortage_does_not_wait_for_nobody(faults: Faults, mode: Any, tmp_path: Path) -> None:
    """Of a unix socket's queue the kernel does not tell the length: the drain has to find its end."""
    assert faults.python(A_DRAIN_FOR_NOBODY, str(tmp_path), repr(mode)) < LIMIT


@modes
@pytest.mark.parametrize(("drain", "exhausted"), [("", "a_minute"), ("0", "a_minute"), ("60", "pause")])
def test_stop_in_back_off(faults: Faults, mode: Any, drain: str, exhausted: str, tmp_path: Path) -> None:
    switch = tmp_path / "while"
    switch.touch()
    environment = faults.environment(switch, accept=[("EMFILE", 1_000_000)])
    options = {"exhausted": exhausted, **mode}
    with server(environment=environment, **options) as process, connect(process.address) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: process.ask("stats")["accept_errors"])
        if drain == "60":
            # The client that was queued is owed its answer: the drain goes on trying.
            switch.unlink()
        took, _ = process.ask("stop", drain)
        assert took < LIMIT
        if drain == "60":
            assert client.recv(10) == b"hello"


# --- the other policies


@pytest.mark.parametrize("mode", [{}, {"threads": 2}, {"threads": 2, "pending": 5}], ids=str)
@pytest.mark.parametrize("busy", [None, "reset", b"busy, come back\n"])
def test_shed(mode: Any, busy: Any) -> None:
    """Whoever waits is told at once, through the descriptor that was kept for that."""
    options = {**mode, "exhausted": "shed"}
    if busy is not None:
        options["busy"] = busy
    with server(nofile=NOFILE, **options) as process:
        assert exchange(process.address, b"first") == b"first"
        process.ask("fill")
        for _ in range(10):
            assert refusal(process.address) == (busy or "reset")
        assert process.ask("stats")["refused"] == 10
        wait_until(lambda: process.ask("stats")["handled"] == 1)
        logged(process, "WARNING")
        process.ask("empty")

        # The round of refusals may not be over, and then the next client is in it.
        wait_until(lambda: is_served(process.address))


def test_shed_without_its_descriptor_pauses(faults: Faults, tmp_path: Path) -> None:
    """ENFILE is the whole system's: giving a descriptor up frees none for us."""
    switch = tmp_path / "while"
    environment = faults.environment(switch, accept=[("ENFILE", 1_000_000)])
    with server(environment=environment, exhausted="shed") as process:
        assert exchange(process.address, b"first") == b"first"
        switch.touch()
        with connect(process.address) as client:
            client.sendall(b"hello")
            wait_until(lambda: process.ask("stats")["accept_errors"])
            assert spent_in_a_second(process, client) < 0.01
            logged(process, "WARNING")
            switch.unlink()
            answered(client)


@pytest.mark.parametrize("mode", [{}, {"threads": 2}, {"busy": "reset", "pending": 5}], ids=str)
def test_shed_gets_its_descriptor_back_from_a_stranger(faults: Faults, mode: Any, tmp_path: Path) -> None:
    """Between the refusal and the retaking another thread takes the last descriptor: then it pauses."""
    switch = tmp_path / "while"
    environment = faults.environment(switch, open=[("EMFILE", 2)])
    with server(environment=environment, nofile=NOFILE, exhausted="shed", **mode) as process:
        assert exchange(process.address, b"first") == b"first"
        wait_until(lambda: process.ask("stats")["handled"] == 1)
        for episode in (1, 2):  # the second begins with the spare in place again
            process.ask("fill")
            switch.touch()
            assert refusal(process.address) == "reset"
            with connect(process.address) as client:
                client.sendall(b"hello")
                waits(client, 0.3)  # whether or not it was queued when the pause began
                since, failed = time.monotonic(), process.ask("stats")["accept_errors"]["EMFILE"]
                assert spent_in_a_second(process, client) < 0.01
                tries = process.ask("stats")["accept_errors"]["EMFILE"] - failed
                # By now the pause has its full length, 100 ms, or has had that after one or two tries more.
                assert 5 <= tries <= (time.monotonic() - since) / 0.1 + 2
                logged(process, *["WARNING", "INFO"] * (episode - 1), "WARNING")
                switch.unlink()
                process.ask("free")
                # The first that comes free is the spare again: who waits is refused through it.
                with pytest.raises(ConnectionResetError):
                    client.recv(10)
            assert [refusal(process.address) for _ in range(5)] == ["reset"] * 5
            process.ask("empty")
            wait_until(lambda: is_served(process.address))
            logged(process, *["WARNING", "INFO"] * episode)


CLOSED_MEANWHILE = """
import ast, ctypes, json, sys, threading, time, fastlisten
from preload import change_plan
from support import connect, exchange, serving, wait_until
library = ctypes.CDLL(None)
go = threading.Event()
def handler(connection):
    if connection.recv(10) == b"held":
        connection.sendall(b"in")
        go.wait(10)
    else:
        connection.sendall(b"served")
def a_connection_closes():
    go.set()
    wait_until(lambda: listener.stats().handled == 1)
def asked(error, attempt):
    a_connection_closes()
    return 60
def trying(error, attempt):
    library.faults_hold(int(attempt == 1))  # the second try is held inside of accept
    return 0.01 if attempt == 1 else 60
exhausted = globals()[sys.argv[2]]
with (
    fastlisten.bind(("127.0.0.1", 0)) as listener,
    serving(listener, handler, exhausted=exhausted, **ast.literal_eval(sys.argv[1])),
    connect(listener) as held,
):
    held.sendall(b"held")
    held.recv(2)
    change_plan(accept=[("EMFILE", 1 if exhausted is asked else 2)])
    with connect(listener) as late:
        late.sendall(b"late")
        if exhausted is trying:
            wait_until(lambda: library.faults_given(b"accept") == 2)
            a_connection_closes()
            library.faults_hold(0)
        print(json.dumps(late.recv(10).decode()))
"""


@pytest.mark.parametrize("when", ["trying", "asked"])
@pytest.mark.parametrize("mode", [{"threads": 2}, {"threads": (1, 4)}], ids=str)
def test_a_close_of_ours_just_before_a_pause_cuts_it_short(faults: Faults, mode: Any, when: str) -> None:
    """While accept is tried again, or `exhausted` asked, nobody polls the wake-up; it rings all the same."""
    assert faults.python(CLOSED_MEANWHILE, repr(mode), when) == "served"


@modes
def test_a_callable_says_how_long_to_pause(faults: Faults, mode: Any) -> None:
    environment = faults.environment(accept=[("ENOBUFS", 4)])
    with server(environment=environment, exhausted="sheds", **mode) as process:
        assert exchange(process.address, b"hello") == b"hello"
        assert process.ask("seen") == [[errno.ENOBUFS, attempt] for attempt in (1, 2, 3, 4)]


@modes
@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("gives_up", "RuntimeError: gave up"),
        ("bad_pause", "TypeError: "),
        ("negative_pause", "ValueError: exhausted must return seconds, at least 0, not -1"),
        ("no_pause", "ValueError: exhausted must return seconds, at least 0, not nan"),
    ],
)
def test_what_a_callable_raises_ends_serve(faults: Faults, mode: Any, policy: str, text: str) -> None:
    environment = faults.environment(accept=[("ENOBUFS", 1_000)])
    with server(environment=environment, exhausted=policy, **mode) as process:
        with connect(process.address):
            _, ended = process.ask("wait")
        assert ended.startswith(text)


def test_a_pause_without_end_is_one(faults: Faults) -> None:
    environment = faults.environment(accept=[("ENOBUFS", 2)])
    with server(environment=environment, exhausted="endless_pause") as process:
        with connect(process.address) as client:
            wait_until(lambda: process.ask("logs"))
            process.ask("resume")  # rings, which cuts a pause short; the second then lasts
            wait_until(lambda: process.ask("stats")["accept_errors"] == {"ENOBUFS": 2})
            waits(client, 0.3)
        assert process.ask("stats")["accepted"] == 0


def test_the_server_process_is_steered() -> None:
    """The tests' own tool: a command that it does not know is told, and the process goes on."""
    with server() as process:
        with pytest.raises(AssertionError, match="no_such_command"):
            process.ask("no_such_command")
        assert process.ask("stats")["accepted"] == 0


# --- elsewhere than in serve()'s accept

IN_A_BATCH = """
import json, fastlisten
from preload import change_plan
from support import connect, told
seen = []
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    listener.settimeout(5)
    with connect(listener), connect(listener), connect(listener):
        change_plan(accept=[(0, 2), ("EMFILE", 1)])
        for _ in range(2):
            for connection in listener.accept_many():
                connection.close()
                seen.append("a client")
            change_plan(accept=[("EMFILE", 1)])
            with connect(listener):  # a timed call asks poll() first
                seen.append(told(listener.accept_many)[1])
            change_plan()
print(json.dumps(seen))
"""


def test_an_error_in_the_middle_of_accept_many_is_left_for_the_next_call(faults: Faults) -> None:
    emfile = errno.EMFILE
    assert faults.python(IN_A_BATCH) == ["a client", "a client", emfile, "a client", "a client", emfile]


ITERATED = """
import json, threading, fastlisten
from support import exchange
answers = []
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    def clients():
        answers.extend(exchange(listener).decode() for _ in range(3))
        listener.stop()
    thread = threading.Thread(target=clients)
    thread.start()
    for connection in listener:
        with connection:
            connection.sendall(connection.recv(10))
    thread.join()
    print(json.dumps([answers, dict(listener.stats().accept_errors)]))
"""


def test_iteration_meets_the_same_table(faults: Faults) -> None:
    plan: Plan = [("ECONNABORTED", 2), ("EMFILE", 3), (0, 1), ("EINTR", 2), ("ENOMEM", 1)]
    answers, errors = faults.python(ITERATED, accept=plan)
    assert answers == ["ping"] * 3
    assert errors == {"ECONNABORTED": 2, "EMFILE": 3, "ENOMEM": 1}


NO_THREADS = """
import ast, json, logging, sys, fastlisten
from preload import change_plan
from server import Records
from support import connect, echo, exchange, serving, told
records = Records()
logging.getLogger("fastlisten").addHandler(records)
logging.getLogger("fastlisten").propagate = False
options, come = map(ast.literal_eval, sys.argv[1:])
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    if come is not None:
        change_plan(thread=[(0, come), ("EAGAIN", 1)])
        ended = told(lambda: listener.serve(echo, **options))
        print(json.dumps([ended[0].__name__, len(records.kept)]))
    else:
        # The thread of serving(), the one that starts serve()'s and the first of these come, no other.
        change_plan(thread=[(0, 3), ("EAGAIN", 1000)])
        with serving(listener, echo, **options):
            answers = [exchange(listener).decode() for _ in range(10)]
        print(json.dumps([sorted(set(answers)), sorted({level for level, _ in records.kept})]))
"""


@pytest.mark.parametrize("mode", [{"threads": (1, 4)}], ids=str)
def test_threads_that_cannot_be_had_are_done_without(faults: Faults, mode: Any) -> None:
    """The one that there is goes on serving; the log tells."""
    assert faults.python(NO_THREADS, repr(mode), "None") == [["ping"], ["WARNING"]]


@pytest.mark.parametrize(
    ("mode", "come"),
    [
        *[({"threads": 2}, come) for come in range(3)],
        *[({"threads": (1, 4)}, come) for come in range(2)],
        ({"busy": "reset", "pending": 3}, 0),
    ],
    ids=str,
)
def test_without_its_first_threads_serve_raises(faults: Faults, mode: Any, come: int) -> None:
    """`come` of them can be had; the first is the one that starts the others."""
    assert faults.python(NO_THREADS, repr(mode), repr(come)) == ["RuntimeError", 0]


NO_REAPER = """
import ast, json, sys, threading, fastlisten
from preload import change_plan
from support import connect, echo, serving, told, wait_until
options = ast.literal_eval(sys.argv[1])

def threads_that_run():
    return sum(thread.ident is not None for thread in threading.enumerate())

with fastlisten.bind(("127.0.0.1", 0)) as listener, connect(listener) as client:
    with serving(listener, echo, **options) as served:
        client.sendall(b"x")
        client.recv(1)
        wait_until(lambda: threads_that_run() == 2 + options.get("threads", 0))  # ours and serving()'s
        change_plan(thread=[("EAGAIN", 1)])
        stopped = told(listener.stop, 5)
        client.close()
        result = served.wait()
print(json.dumps([stopped[0].__name__, list(result)]))
"""


@pytest.mark.parametrize("mode", [{}, {"threads": 2}], ids=str)
def test_a_drain_that_gets_no_thread_to_watch_its_time_still_ends(faults: Faults, mode: Any) -> None:
    """It tells, as nobody will cut what takes too long; the stop itself is under way."""
    assert faults.python(NO_REAPER, repr(mode)) == ["RuntimeError", [1, 0]]


SIGNAL_BEFORE_THE_FIRST_WAIT = """
import ast, json, signal, sys, fastlisten
from preload import change_plan
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    change_plan(signal=[(signal.SIGINT.value, 1)])
    try:
        listener.serve(print, **ast.literal_eval(sys.argv[1]))
    except KeyboardInterrupt:
        print(json.dumps("interrupted"))
"""


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_signal_just_before_the_loop_first_waits_is_not_lost(faults: Faults, mode: Any) -> None:
    """Python has noted it and nobody rang: signal.set_wakeup_fd() looks at its descriptor, with
    fstat() and without the GIL, before it sets it."""
    assert faults.python(SIGNAL_BEFORE_THE_FIRST_WAIT, repr(mode)) == "interrupted"


TIMED_ACCEPT = """
import json, socket, sys, fastlisten
from preload import change_plan
from support import connect, told
make = {"original": socket.create_server, "ours": fastlisten.create_server}[sys.argv[1]]
found = []
with make(("127.0.0.1", 0)) as listener:
    listener.settimeout(0.05)
    change_plan(accept=[("EMFILE", 2)])
    found.append(told(listener.accept)[:2])
    for code in "EMFILE", "ECONNABORTED", "EPERM", "EINVAL":
        with connect(listener):
            change_plan(accept=[(code, 2)])
            found.append(told(listener.accept)[:2])
            change_plan()
            listener.accept()[0].close()
print(json.dumps([[error.__name__, code] for error, code in found]))
"""


def test_a_timed_accept_tells_what_is_wrong_only_when_somebody_is_queued(faults: Faults) -> None:
    """The original waits before it tries, and so finds nothing wrong as long as nobody comes."""
    original, ours = (faults.python(TIMED_ACCEPT, which) for which in ("original", "ours"))
    assert ours == original
    assert original[:2] == [["TimeoutError", None], ["OSError", errno.EMFILE]]
