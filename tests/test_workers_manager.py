"""A parent of workers under a service manager: what it tells, what workers are not told, and its sockets."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlisten
from helpers import needs, own_loopback, posix_only, wait_until
from helpers.command import COMMAND
from helpers.managers import Manager, manager
from helpers.programs import plain_environment, run, sanitizers
from helpers.workers import SOME, WAITS, children_of, gone, parent, suspend
from test_workers_handover import handed_over

pytestmark = [posix_only("there are no datagrams between unix sockets"), needs("Linux")]

# A handler that says what its process has of the manager's.
MODULE = """
import os
import fastlisten


def handler(connection):
    word = connection.recv(100)
    names = [name for name in os.environ if name.startswith(("NOTIFY", "WATCHDOG", "LISTEN_"))]
    text = f"{fastlisten.worker().number} {os.getpid()}" if word == b"who" else repr(names)
    connection.sendall(text.encode())
"""


@pytest.fixture
def told(unix_paths: Path) -> Iterator[Manager]:
    with manager(str(unix_paths / "notify")) as told:
        yield told


def environment(told: Manager, folder: Path, **added: str) -> dict[str, str]:
    (folder / "service.py").write_text(MODULE)
    plain = plain_environment(NOTIFY_SOCKET=told.address, **added)
    return {**plain, "PYTHONPATH": f"{plain['PYTHONPATH']}:{folder}"}


def command(endpoint: str, *options: str) -> list[str]:
    return [*COMMAND, "serve", endpoint, "service:handler", "--workers", "2", *options]


def test_what_the_command_tells(told: Manager, tmp_path: Path) -> None:
    with parent(command("127.0.0.1:0"), environment=environment(told, tmp_path)) as server:
        where = "listening on {}:{}".format(*server.address)
        assert told.message() == ["READY=1", f"STATUS=2 workers, {where}"]
        server.workers(2)
        server.send(signal.SIGHUP)
        reloading, since, status = told.message()
        assert (reloading, status) == ("RELOADING=1", "STATUS=SIGHUP: replacing 2 workers")
        assert int(since.removeprefix("MONOTONIC_USEC=")) > 0
        server.line_with("SIGHUP: 2 of 2 workers are replaced")
        assert told.message() == ["READY=1", "STATUS=SIGHUP: 2 of 2 workers are replaced"]
        server.end()
        assert told.message() == ["STOPPING=1", "STATUS=SIGTERM: draining for at most 5 s"]
        assert told.tells_nothing()


def test_a_program_that_runs_workers_tells_the_same(told: Manager, tmp_path: Path) -> None:
    with parent(SOME, environment=environment(told, tmp_path)) as server:
        assert told.message()[0] == "READY=1"
        server.end()
        assert told.message()[0] == "STOPPING=1"


def test_a_reload_that_fails_ends_too(told: Manager, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    program = f"""
def target(listener):
    if os.path.exists({str(flag)!r}):
        sys.exit(4)
    return listener.serve(handler)

fastlisten.Workers(target, '127.0.0.1:0', workers=2).run()
"""
    with parent(program, environment=environment(told, tmp_path)) as server:
        told.message_with("READY=1")
        flag.touch()
        server.send(signal.SIGHUP)
        told.message_with("RELOADING=1")
        assert told.message() == ["READY=1", "STATUS=SIGHUP: 0 of 2 workers are replaced"]
        server.end()


def test_the_counters_are_told(told: Manager, tmp_path: Path) -> None:
    text = f"import fastlisten._workers.manager as m\nm.STATUS_INTERVAL = 0.05\n{SOME}"
    with parent(text, environment=environment(told, tmp_path)) as server:
        server.ask()
        where = "listening on {}:{}".format(*server.address)
        told.message_with(f"STATUS={where}: 1 accepted, 0 active")
        server.end()


def test_workers_are_not_told_of_the_manager(told: Manager, tmp_path: Path) -> None:
    given = environment(told, tmp_path, WATCHDOG_USEC="60000000")
    threads = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    run_them = "import service; fastlisten.serve(service.handler, '127.0.0.1:0', workers=2)"
    for program in (command("127.0.0.1:0"), run_them, threads + run_them):
        with parent(program, environment=given) as server, server.connect() as client:
            client.sendall(b"environment")
            assert client.recv(100) == b"[]"


def test_any_program_has_a_manager_of_its_own(told: Manager, tmp_path: Path) -> None:
    text = WAITS + "serve(f\"{os.environ['NOTIFY_SOCKET']} {'WATCHDOG_USEC' in os.environ}\".encode())"
    line = [*COMMAND, "workers", "--bind", "127.0.0.1:0", "--workers", "2", "--", "python3", "-c", text]
    with parent(line, environment=environment(told, tmp_path, WATCHDOG_USEC="60000000")) as server:
        assert told.message()[0] == "READY=1"
        with server.connect() as client:
            client.sendall(b"who")
            path, watched = client.recv(200).split()
            assert path.decode() != told.address
            assert watched == b"False"
        server.end()


# --- the watchdog


def test_the_watchdog_is_fed_while_clients_come_on(told: Manager, tmp_path: Path) -> None:
    with parent(command("127.0.0.1:0"), environment=environment(told, tmp_path, WATCHDOG_USEC="200000")):
        told.message_with("READY=1")
        for _ in range(3):
            assert told.message() == ["WATCHDOG=1"]


def test_a_worker_that_crashes_again_and_again_does_not_keep_it_from_being_fed(
    told: Manager, tmp_path: Path
) -> None:
    program = """
def target(listener):
    if fastlisten.worker().number == 1:
        sys.exit(3)
    return listener.serve(handler)

fastlisten.Workers(target, '127.0.0.1:0', workers=2).run()
"""
    given = environment(told, tmp_path, WATCHDOG_USEC="200000")
    with parent(program, until="again in 0.2 s", environment=given):
        for _ in range(3):
            assert told.message() == ["WATCHDOG=1"]


def test_it_is_not_fed_while_every_worker_leaves_its_clients_waiting(told: Manager, tmp_path: Path) -> None:
    given = environment(told, tmp_path, WATCHDOG_USEC="200000")
    with parent(SOME, environment=given) as server:
        workers = server.workers(4)
        for pid in workers.values():
            suspend(pid)
        clients = [server.connect() for _ in range(80)]  # some for each

        def hungry() -> bool:
            """Three times the interval without food."""
            told.socket.settimeout(0.3)
            try:
                return told.message() != ["WATCHDOG=1"]
            except TimeoutError:
                return True

        wait_until(hungry)
        for pid in workers.values():
            os.kill(pid, signal.SIGCONT)
        told.socket.settimeout(10)
        told.message_with("WATCHDOG=1")
        for client in clients:
            client.close()


def test_a_watchdog_option_of_serve_is_refused_with_workers() -> None:
    with fastlisten.Notifier({}) as notifier, pytest.raises(ValueError, match="the parent of workers feeds"):
        fastlisten.serve(print, "127.0.0.1:0", workers=2, watchdog=notifier)


# --- another parent


def test_the_manager_is_told_of_the_parent_that_takes_over(told: Manager, tmp_path: Path) -> None:
    program = f"os.environ['WATCHDOG_PID'] = str(os.getpid())\n{SOME}"
    given = environment(told, tmp_path, WATCHDOG_USEC="60000000")
    with parent(program, environment=given) as server:
        told.message_with("READY=1")
        with handed_over(server) as pid:
            messages = [told.message(), told.message()]
            assert [f"MAINPID={pid}"] in messages  # by the old one
            messages.remove([f"MAINPID={pid}"])
            assert messages[0][0] == "READY=1"  # by the new one
            assert server.process.wait(20) == 0
            assert told.tells_nothing()  # nobody is about to stop
            os.kill(pid, signal.SIGTERM)
            assert told.message()[0] == "STOPPING=1"
            wait_until(lambda: gone(pid))


# --- systemd's sockets


@needs("systemd-socket-activate (Debian's package systemd)")
@pytest.mark.parametrize("name", ["", "web"])
@pytest.mark.parametrize("inet", [True, False])
def test_the_sockets_of_systemd_are_shared_and_stay(
    told: Manager, tmp_path: Path, unix_paths: Path, name: str, inet: bool
) -> None:
    path = str(unix_paths / "s")
    with socket.create_server((own_loopback(), 0)) as probe:
        address = probe.getsockname()
    listen = "{}:{}".format(*address) if inet else path
    given = environment(told, tmp_path)
    passed_on = {name: given[name] for name in ("PYTHONPATH", "NOTIFY_SOCKET", *sanitizers())}
    set_there = [f"--setenv={name}={value}" for name, value in passed_on.items()]
    names = ["--fdname=web"] if name else []
    activate = ["systemd-socket-activate", f"--listen={listen}", *names, *set_there]
    with parent(
        [*activate, *command(f"systemd:{name}")], until=None, listening=None, environment=given
    ) as server:
        assert server.process.stderr is not None
        while "Listening on" not in server.process.stderr.readline():
            assert server.process.poll() is None
        server.address = address if inet else path
        first = server.ask()  # which starts it
        told.message_with("READY=1")
        server.line_with("listening on ")
        assert first.pid in children_of(server.process.pid)
        assert len(server.workers(2)) == 2
        server.send(signal.SIGHUP)
        told.message_with("RELOADING=1")
        told.message_with("READY=1")
        assert len(server.workers(2)) == 2
        with handed_over(server) as pid:
            assert server.process.wait(20) == 0
            assert len(server.workers(2)) == 2
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: gone(pid))
    assert inet or os.path.exists(path)


def test_what_a_parent_says_of_a_manager_that_cannot_be_told(tmp_path: Path) -> None:
    program = """
import fastlisten, logging, os, signal, sys, threading
logging.basicConfig(stream=sys.stdout, format="%(message)s")
def target(listener):
    threading.Timer(0.01, os.kill, [os.getppid(), signal.SIGTERM]).start()
    return listener.serve(print)
os.environ["NOTIFY_SOCKET"] = "/no/such/socket"
fastlisten.Workers(target, "127.0.0.1:0", workers=1).run()
os.environ["NOTIFY_SOCKET"] = "vsock:2:1"
fastlisten.Workers(target, "127.0.0.1:0", workers=1).run()
"""
    first, second = run(program).stdout.splitlines()
    assert first == f"the service manager is not told: {os.strerror(2)}"
    assert second.startswith("the service manager is not told: NOTIFY_SOCKET must be")
