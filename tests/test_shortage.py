"""Out of descriptors or memory: what is tried again, shed, logged and told."""

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

from helpers import LIMIT, connect, exchange, needs, refusal, wait_until
from helpers.faults import Faults
from helpers.programs import python
from helpers.serve import MODES, modes
from helpers.server_process import server

pytestmark = needs("Linux", "a C compiler")


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


# A loop that spins spends the whole second. Ten tries to accept take 5 ms, on a slow machine twice as much.
SPINNING = 0.1


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
            waits(client, 1.5)
            spent = process.ask("cpu") - begun
            assert spent < 0.03, f"{spent:.3f} s of CPU in 1.5 s"
            logged(process, "WARNING")
            [(code, tries)] = process.ask("stats")["accept_errors"].items()
            assert code == "EMFILE"
            assert tries >= 10  # of 18: a busy machine is late, by half of the 100 ms if need be
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
            assert spent_in_a_second(process, client) < SPINNING
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
    assert python(WITHOUT_LOGGING, repr(mode)) == ["hello"]


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
from helpers.faults import change_plan
from helpers import echo, serving, wait_until

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
            assert spent_in_a_second(process, client) < SPINNING
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
                assert spent_in_a_second(process, client) < SPINNING
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
from helpers.faults import change_plan
from helpers import connect, exchange, serving, wait_until
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
        print(json.dumps([late.recv(10).decode(), exchange(listener, b"later").decode()]))
"""


@pytest.mark.parametrize("when", ["trying", "asked"])
@pytest.mark.parametrize(
    "mode", [{"threads": 2}, {"threads": (1, 4)}, {"threads": 2, "busy": "reset", "pending": 5}], ids=str
)
def test_a_close_of_ours_just_before_a_pause_cuts_it_short(faults: Faults, mode: Any, when: str) -> None:
    """While accept is tried again, or `exhausted` asked, nobody polls the wake-up; it rings all the same.

    With busy= the thread that refuses hears it while `exhausted` is asked: what that says comes too late.
    """
    assert faults.python(CLOSED_MEANWHILE, repr(mode), when) == ["served", "served"]


@modes
@pytest.mark.parametrize("policy", ["sheds", "slow_pause"])
def test_a_callable_says_how_long_to_pause(faults: Faults, mode: Any, policy: str) -> None:
    """After each failure, however long it takes to say so: the thread that refuses waits for that."""
    environment = faults.environment(accept=[("ENOBUFS", 4)])
    with server(environment=environment, exhausted=policy, **mode) as process:
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
