"""`fastlisten workers` and `fastlisten serve --workers`: any program as a worker, and what is told."""

import http.client
import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from helpers import compiler, needs, posix_only, wait_until
from helpers.command import COMMAND, is_one_line
from helpers.command import run as run_command
from helpers.programs import run
from helpers.workers import WAITS, Running, gone, parent, suspend, while_clients_come

pytestmark = [posix_only("signals between processes"), needs("Linux")]

WORKERS = [*COMMAND, "workers", "--bind", "127.0.0.1:0", "--workers", "2"]

# Knows of systemd's variables alone.
PLAIN = (
    WAITS
    + """
assert os.environ.get("LISTEN_PID", str(os.getpid())) == str(os.getpid())
assert os.environ["LISTEN_FDNAMES"] == "bind0"
assert os.environ["LISTEN_FDS"] == "1" and sys.argv[1] == "3"
serve(b"%s %d" % (sys.argv[2].encode(), os.getpid()))
"""
)

# Says when it is ready, and does not accept before.
NOTIFYING = (
    WAITS
    + """
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.connect(os.environ["NOTIFY_SOCKET"])
    manager.send(b"STATUS=here\\nREADY=1\\n")
serve(b"%s %d" % (sys.argv[1].encode(), os.getpid()))
"""
)

IN_C = """
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    char text[100], answer[100];
    sigset_t none, term;
    if (count < 2 || getenv("LISTEN_FDS") == NULL || atoi(getenv("LISTEN_PID")) != (int)getpid())
        return 1;
    sigemptyset(&none);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    for (;;) {
        int client;
        fd_set listener;
        FD_ZERO(&listener);
        FD_SET(3, &listener);
        if (pselect(4, &listener, NULL, NULL, NULL, &none) <= 0)
            continue;
        client = accept(3, NULL, NULL);
        if (client >= 0 && recv(client, text, sizeof text, 0) > 0) {
            int length = snprintf(answer, sizeof answer, "%s %d", arguments[1], (int)getpid());
            send(client, answer, (size_t)length, MSG_NOSIGNAL);
        }
        close(client);
    }
}
"""


def restarts(server: Running) -> None:
    """Have both workers replaced while clients come: none is lost, and all that were there are gone."""
    before = server.workers(2)

    def restart() -> None:
        server.send(signal.SIGHUP)
        wait_until(lambda: all(map(gone, before.values())))

    assert while_clients_come(server, 200, restart) == []
    assert set(server.workers(2).values()).isdisjoint(before.values())


@pytest.mark.parametrize("program", [PLAIN, NOTIFYING], ids=["plain", "notifying"])
def test_a_program_that_takes_systemd_s_variables(program: str) -> None:
    arguments = ["{fd}", "{n}"] if program is PLAIN else ["{n}"]
    with parent([*WORKERS, "--", sys.executable, "-c", program, *arguments]) as server:
        restarts(server)
        killed = server.workers(2)[1]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: gone(killed))  # whom it takes before that is lost
        assert server.workers(2)[1] != killed
        server.end()


def test_a_program_in_c_and_one_that_a_shell_starts(tmp_path: Path) -> None:
    source, program = tmp_path / "server.c", tmp_path / "server"
    source.write_text(IN_C)
    if shutil.which(compiler()) is None:
        pytest.skip("needs a C compiler")
    run([compiler(), "-o", str(program), str(source)])
    with parent([*WORKERS, "--", str(program), "{n}"]) as server:
        restarts(server)
        server.end()
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nexec "{program}" "$1"\n')
    script.chmod(0o755)
    with parent([*WORKERS, "--", str(script), "{n}"]) as server:
        restarts(server)
        server.end()


# Has socat accept, with a process for each client.
SOCAT = """#!/bin/sh
export WORKER="$1 $$"
exec socat ACCEPT-FD:"$2",fork SYSTEM:'dd bs=100 count=1 of=/dev/null 2>/dev/null; echo "$WORKER"' 2>/dev/null
"""


# Go's own listener: it never blocks in accept(), and has threads of its own.
IN_GO = """
package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
)

func main() {
	number, _ := strconv.Atoi(os.Args[2])
	listener, err := net.FileListener(os.NewFile(uintptr(number), "listener"))
	if err != nil {
		panic(err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go func() {
			if n, _ := client.Read(make([]byte, 100)); n > 0 {
				fmt.Fprintf(client, "%s %d", os.Args[1], os.Getpid())
			}
			client.Close()
		}()
	}
}
"""


@pytest.fixture(params=["C", "Go", "socat"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Give a program that takes its worker's number and its listener's descriptor; nothing of us."""
    program = tmp_path / "server"
    if request.param == "socat":
        if shutil.which("socat") is None or "accept-fd" not in run(["socat", "-hh"]).stdout.lower():
            pytest.skip("needs the command socat with ACCEPT-FD, which 1.8 has")
        program.write_text(SOCAT)
        program.chmod(0o755)
        return program
    compile_with, name, text = {
        "C": ([compiler(), "-o"], "server.c", IN_C),
        "Go": (["go", "build", "-o"], "server.go", IN_GO),
    }[request.param]
    if shutil.which(compile_with[0]) is None:
        pytest.skip(f"needs a compiler for {request.param}")
    source = tmp_path / name
    source.write_text(text)
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GO111MODULE": "off"}
    run([*compile_with, str(program), str(source)], environment=environment, limit=60)
    return program


def queued_behind(server: Running, pid: int) -> list[socket.socket]:
    """Stop a process and return clients that are queued for it, if it is the only one."""
    suspend(pid)
    clients = [server.connect() for _ in range(20)]
    for client in clients:
        client.sendall(b"who")
    return clients


def answered(clients: list[socket.socket]) -> set[int]:
    """Return which processes have answered these clients."""
    pids = set()
    for client in clients:
        with client:
            pids.add(int(client.recv(100).split()[1]))
    return pids


ONE = [*COMMAND, "workers", "--bind", "127.0.0.1:0", "--workers", "1", "--drain", "0.2", "--"]


def test_a_program_s_queue_is_served_by_the_next_when_it_is_killed(program: Path) -> None:
    with parent([*ONE, str(program), "{n}", "{fd}"]) as server:
        old = server.ask().pid
        clients = queued_behind(server, old)
        os.kill(old, signal.SIGKILL)
        assert old not in answered(clients)
        server.end()


def test_a_stuck_program_s_queue_is_served_when_it_is_replaced(program: Path) -> None:
    with parent([*ONE, str(program), "{n}", "{fd}"]) as server:
        old = server.ask().pid
        clients = queued_behind(server, old)
        server.send(signal.SIGHUP)
        assert old not in answered(clients)
        server.end()


def test_a_stuck_program_gets_no_new_clients_and_loses_none() -> None:
    with parent([*WORKERS, "--", sys.executable, "-c", PLAIN, "{fd}", "{n}"]) as server:
        stuck = server.workers(2)[1]
        suspend(stuck)
        waiting: list[socket.socket] = []
        in_a_row = 0
        while in_a_row < 30:  # by chance it would be one of a thousand million
            client = server.connect()
            client.sendall(b"who")
            if select.select([client], [], [], 0.2)[0]:
                in_a_row += 1
                assert stuck not in answered([client])
            else:
                in_a_row = 0
                waiting.append(client)
        os.kill(stuck, signal.SIGCONT)
        assert stuck in answered(waiting)
        assert len(server.workers(2)) == 2  # it gets clients again
        server.end()


def test_what_a_shell_has_started_ends_with_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PLAIN)
    # not by exec: LISTEN_PID is that of the shell
    script = f'unset LISTEN_PID; "{sys.executable}" "{program}" 3 $1; true'
    with parent([*WORKERS, "--drain", "0.2", "--", "sh", "-c", script, "sh", "{n}"]) as server:
        workers = server.workers(2)
        server.send(signal.SIGQUIT)
        assert server.process.wait(10) == 0
        wait_until(lambda: all(map(gone, workers.values())))


ASGI = """
import os

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    headers = [(b"content-length", b"%d" % len(text()))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text()})

def text():
    return b"%d" % os.getpid()

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", str(len(text())))])
    return [text()]
"""


class Web(Running):
    """Asks for a page that says which process has made it."""

    def pid(self) -> int:
        connection = http.client.HTTPConnection(self.address[0], self.address[1], timeout=10)
        try:
            connection.request("GET", "/")
            return int(connection.getresponse().read())
        finally:
            connection.close()


@pytest.mark.parametrize(
    "command",
    [
        "uvicorn service:app --fd {fd} --log-level warning",
        "hypercorn service:app --bind fd://{fd}",
        "gunicorn service:wsgi",
    ],
)
def test_servers_of_others(tmp_path: Path, command: str) -> None:
    name, *arguments = command.split()
    pytest.importorskip(name)
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs the command {name}")
    (tmp_path / "service.py").write_text(ASGI)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    with parent([*WORKERS, "--", found, *arguments], environment=environment) as running:
        server = object.__new__(Web)
        vars(server).update(vars(running))
        seen = {server.pid() for _ in range(30)}
        assert len(seen) == 2
        ended = 0
        server.send(signal.SIGHUP)
        lines = 0
        while ended < 2:
            lines += 1
            assert lines < 50
            ended += "ended" in server.line_with("worker")
            assert server.pid()
        assert seen.isdisjoint({server.pid() for _ in range(30)})
        server.end()


# --- fastlisten serve --workers


def test_serve_in_several_processes() -> None:
    command = [*COMMAND, "serve", "127.0.0.1:0", "echo", "--workers", "2"]
    with parent(command) as server:
        with server.connect() as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        lines = server.end()
        assert lines[-1].startswith("stopped by SIGTERM: ")
        assert lines[-1].endswith(" finished, 0 cut; 1 accepted, 1 handled")


def test_the_counters_as_json_have_a_row_a_worker() -> None:
    command = [*COMMAND, "serve", "127.0.0.1:0", "echo", "--workers", "2", "--json"]
    with parent(command, until="serving", listening='"endpoint": "') as server:
        with server.connect() as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            stats = json.loads(server.line_with('"stats"'))
            while not stats["accepted"]:
                stats = json.loads(server.line_with('"stats"'))
        assert (stats["accepted"], stats["active"]) == (1, 1)
        assert sorted(row["accepted"] for row in stats["workers"]) == [0, 1]
        assert [row["worker"] for row in stats["workers"]] == [0, 1]
        server.end()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["workers"], 2, "--bind"),
        (["workers", "--bind", "127.0.0.1:0"], 2, "needs a program after --"),
        (["workers", "--bind", "127.0.0.1:0", "--"], 2, "needs a program after --"),
        (["workers", "--bind", "nonsense", "--", "true"], 2, "expected host:port"),
        (["workers", "--bind", "127.0.0.1:0", "--", "no-such-program"], 2, "no program that can be run"),
        (["workers", "--bind", "127.0.0.1:0", "--", "uvicorn", "app:app"], 2, "--fd {fd}"),
        (
            ["workers", "--bind", "127.0.0.1:0", "--workers", "0", "--", "true"],
            2,
            "'0' is not a number from 1",
        ),
        (["workers", "--bind", "127.0.0.1:0", "--workers", "9999", "--", "true"], 2, "must be at most 500"),
        (["serve", "--workers", "0"], 2, "'0' is not a number from 1"),
        (["serve", "--ready-timeout", "3"], 2, "--ready-timeout needs --workers"),
        (["serve", "127.0.0.1:0", "nosuch:handler", "--workers", "2"], 2, "nosuch"),
        (["serve", "127.0.0.1:0", "--workers", "2", "--mode", "600"], 2, "--mode is for unix paths"),
    ],
)
def test_bad_arguments(arguments: list[str], status: int, said: str) -> None:
    is_one_line(run_command(*arguments), status, said)


def test_an_endpoint_in_use() -> None:
    with parent() as server:
        endpoint = "{}:{}".format(*server.address)
        for command in (["serve", endpoint, "--workers", "2"], ["workers", "--bind", endpoint, "--", "true"]):
            is_one_line(run_command(*command), 1, f"cannot listen on {endpoint}: Address already in use by")
        server.workers(4)
