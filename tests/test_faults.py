"""What a failed system call means: the table of DESIGN.md line by line, and calls elsewhere."""

import errno
from typing import Any

import pytest

from helpers import needs
from helpers.faults import Faults, Plan
from helpers.programs import python
from helpers.serve import MODES, modes

pytestmark = needs("Linux", "a C compiler")


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
from helpers.faults import change_plan
from helpers.server import Records
from helpers import connect, echo, exchange, serving, told, wait_until

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


@pytest.fixture(scope="module", params=MODES.values(), ids=list(MODES))
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
from helpers import connect
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
from helpers import echo, exchange, serving
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
from helpers import connect, serving
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
from helpers import told
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
    seen = python(NOT_A_LISTENER, repr(mode))
    closed = errno.EBADF
    assert seen == [errno.EINVAL, closed, errno.EINVAL, closed, errno.EOPNOTSUPP, closed]


@pytest.mark.parametrize("mode", [{}, {"threads": 2}], ids=["inline", "threads"])
def test_a_failed_poll_is_raised(faults: Faults, mode: Any) -> None:
    code = """
import ast, json, sys, fastlisten
from helpers import told
with fastlisten.bind(("127.0.0.1", 0)) as listener:
    print(json.dumps(told(lambda: listener.serve(print, **ast.literal_eval(sys.argv[1])))[1]))
"""
    # With threads the caller of serve() polls too; then either may meet the fault.
    assert faults.python(code, repr(mode), poll=[("EINVAL", 1000)]) == errno.EINVAL


WITHOUT_MEMORY = """
import ast, json, logging, os, sys, threading, fastlisten
from helpers import connect, read_all, wait_until
from helpers.faults import change_plan
told, answers = [], []
class Keeps(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
logging.getLogger("fastlisten").addHandler(Keeps())
logging.getLogger("fastlisten").setLevel("INFO")

def handler(connection):
    os.write(connection.fileno(), b"hi")  # no call that is to fail

def ask():
    with connect(listener, None) as client:  # under a time limit it would poll, too
        answers.append(read_all(client).decode())

with fastlisten.bind(("127.0.0.1", 0)) as listener:
    serving = threading.Thread(
        target=listener.serve, args=(handler,), kwargs=ast.literal_eval(sys.argv[1]))
    serving.start()
    ask()
    wait_until(lambda: listener.stats().active == 0)
    change_plan(**{sys.argv[2]: [("ENOMEM", 1)]})
    ask()
    change_plan(**{sys.argv[2]: [("ENOMEM", 1)]})
    listener.pause()
    listener.resume()
    ask()
    change_plan(**{sys.argv[2]: [("ENOMEM", 1)]})
    listener.stop()
    serving.join(10)
    print(json.dumps([answers, serving.is_alive(), told]))
"""


@modes
@pytest.mark.parametrize("call", ["poll", "wake"])
def test_one_failure_of_a_wait_or_a_wake_up_ends_nothing(faults: Faults, call: str, mode: Any) -> None:
    """poll() of whoever waits, send() of whoever wakes: nobody is stuck, and it is told."""
    answers, alive, told = faults.python(WITHOUT_MEMORY, repr(mode), call)
    assert (answers, alive) == (["hi"] * 3, False)
    words = ("accepting pauses: ", "accepting again after ", "a wake-up failed, ")
    assert all(line.startswith(words) for line in told)
    assert len(told) <= 8


# --- elsewhere than in serve()'s accept


IN_A_BATCH = """
import json, fastlisten
from helpers.faults import change_plan
from helpers import connect, told
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
from helpers import exchange
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
from helpers.faults import change_plan
from helpers.server import Records
from helpers import connect, echo, exchange, serving, told
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
from helpers.faults import change_plan
from helpers import connect, echo, serving, told, wait_until
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


# serve() imports logging; the signal is to come after that.
SIGNAL_BEFORE_THE_FIRST_WAIT = """
import ast, json, logging, signal, sys, fastlisten
from helpers.faults import change_plan
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
from helpers.faults import change_plan
from helpers import connect, told
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
