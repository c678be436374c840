"""Worker processes: that they serve, that they are replaced without a client lost, and that none is left."""

import errno
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

import fastlisten
from helpers import LOOPBACK, needs, nobody_listens, not_under_wine, wait_until
from helpers.programs import plain_environment, run, sanitizers
from helpers.workers import (
    COUNT,
    FORKS,
    HANDLER,
    alive,
    children_of,
    gone,
    main,
    parent,
    suspend,
    while_clients_come,
)

linux = needs("Linux")
slow_to_start = not_under_wine("an interpreter takes seconds to start, and others show what is the system's")

# What a program does with it, it says; HANDLER has the same.
TOLD = getattr(signal, "SIGUSR1", signal.SIGABRT)


def test_each_worker_serves_and_a_signal_ends_them() -> None:
    with parent() as server:
        workers = server.workers(COUNT)
        assert sorted(workers) == list(range(COUNT))
        assert not FORKS or sorted(workers.values()) == sorted(children_of(server.process.pid))
        server.end()
        assert all(map(gone, workers.values()))
    assert fastlisten.worker() is None


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", pytest.param("SIGBREAK", marks=pytest.mark.skipif(FORKS, reason="what Windows has"))],
)
def test_a_client_that_is_served_is_let_finish(name: str) -> None:
    with parent() as server, server.connect() as client:
        client.sendall(b"say")
        assert client.recv(100)
        server.send(getattr(signal, name))
        server.line_with("draining")
        client.sendall(b"the end")
        assert client.recv(100) == b""
        assert server.process.wait(10) == 0


IN_THREADS = """
def target(listener):
    return listener.serve(handler, threads=2)

"""
IN_TASKS = """
import asyncio

async def answer(reader, writer):
    await reader.read(100)
    writer.write(b"%d %d" % (fastlisten.worker().number, os.getpid()))
    await reader.read(100)
    writer.close()

async def target(listener):
    async with await asyncio.start_server(answer, sock=listener) as server:
        await server.serve_forever()

"""


@slow_to_start
@pytest.mark.parametrize("target", [IN_THREADS, IN_TASKS], ids=["threads", "tasks"])
def test_who_comes_while_all_workers_end_is_refused(target: str) -> None:
    """None of them listens any more then, nor does the parent; who has come before is served to the end."""
    program = target + main("fastlisten.Workers(target, '127.0.0.1:0', workers=2, drain=60).run()")
    with parent(program) as server, server.connect() as client:
        client.sendall(b"say")
        assert client.recv(100)
        server.send(signal.SIGTERM)
        server.line_with("draining")
        wait_until(lambda: nobody_listens(server.address))
        client.sendall(b"the end")
        assert client.recv(100) == b""
        assert server.process.wait(10) == 0


@slow_to_start
def test_a_target_may_stop_its_listener_and_serve_it_again() -> None:
    """Only when the parent has asked a worker to end are its listeners closed."""
    program = """
def once(connection):
    handler(connection)
    connection.close()
    stop()

def target(listener):
    global stop
    stop = listener.stop
    while not fastlisten.worker().stopping:
        listener.serve(once, threads=1)

""" + main("fastlisten.Workers(target, '127.0.0.1:0', workers=1).run()")
    with parent(program) as server:
        assert len({server.ask().pid for _ in range(3)}) == 1
        server.end()


@pytest.mark.parametrize("names", [pytest.param("SIGQUIT", marks=linux), "SIGTERM SIGINT"])
def test_now_means_now(names: str) -> None:
    with parent() as server, server.connect() as client:
        client.sendall(b"say")
        assert client.recv(100)
        for number in (getattr(signal, name) for name in names.split()):
            server.send(number)
            server.line_with("draining")
        assert server.process.wait(5) == 0


@slow_to_start
def test_a_worker_that_does_not_end_is_killed() -> None:
    program = main("fastlisten.Workers(serve, '127.0.0.1:0', workers=2, drain=0.1).run()")
    with parent(program) as server:
        server.ask("sleep 60")
        server.send(signal.SIGTERM)
        server.line_with("killed")
        assert server.process.wait(5) == 0


@linux
def test_a_rolling_restart_loses_nobody() -> None:
    with parent() as server:
        before = server.workers(4)

        def restart() -> None:
            for _ in range(3):
                server.send(signal.SIGHUP)
                for _ in range(4):
                    server.line_with("serves after")

        assert while_clients_come(server, 500, restart) == []
        wait_until(lambda: all(map(gone, before.values())))
        assert set(server.workers(4).values()).isdisjoint(before.values())


@linux
def test_the_old_one_is_asked_to_go_when_the_new_one_serves() -> None:
    with parent("fastlisten.Workers(serve, '127.0.0.1:0', workers=1).run()") as server:
        old = server.ask().pid
        server.send(signal.SIGHUP)
        server.line_with("is process")
        server.line_with("serves after")
        server.line_with(f"worker 0 (process {old}) ended with status 0")


@linux
def test_a_killed_worker_s_queue_is_served_by_the_next() -> None:
    with parent("fastlisten.Workers(serve, '127.0.0.1:0', workers=1).run()") as server:
        old = server.ask().pid
        suspend(old)
        clients = [server.connect() for _ in range(20)]
        for client in clients:
            client.sendall(b"who")
        os.kill(old, signal.SIGKILL)
        for client in clients:
            with client:
                assert int(client.recv(100).split()[1]) != old


@linux
def test_nobody_waits_behind_a_stuck_worker() -> None:
    with parent("fastlisten.Workers(serve, '127.0.0.1:0', workers=3).run()") as server:
        server.workers(3)
        stuck = server.ask("sleep 30").pid
        for _ in range(100):  # some go to its queue at first
            assert server.ask().pid != stuck
        server.end(signal.SIGQUIT)


@linux
def test_the_parent_has_little_to_do_while_a_worker_is_stuck() -> None:
    program = """
from fastlisten._workers.relief import Relief
looks, look = 0, Relief.look

def counted(self, now):
    global looks
    looks += 1
    look(self, now)

Relief.look = counted
signal.signal(TOLD, lambda *_: print("looks", looks, flush=True))
fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()
"""
    with parent(program) as server:
        server.workers(2)
        stuck = server.ask("sleep 30").pid
        begun = time.monotonic()
        while time.monotonic() - begun < 1.5:  # many clients come, and none of them waits
            assert server.ask().pid != stuck
        server.send(TOLD)
        looks = int(server.line_with("looks ").split()[1])
        assert looks < 150  # it looks 375 times, but without Python
        server.end(signal.SIGQUIT)


@linux
def test_a_stopped_worker_s_queue_is_taken_by_the_others() -> None:
    with parent("fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()") as server:
        stopped = server.workers(2)[0]
        suspend(stopped)
        clients = [server.connect() for _ in range(40)]  # about a half to each
        for client in clients:
            client.sendall(b"who")
        for client in clients:
            with client:
                assert int(client.recv(100).split()[1]) != stopped
        os.kill(stopped, signal.SIGCONT)
        assert len(server.workers(2)) == 2  # it gets clients again


@linux
@pytest.mark.parametrize("loop", ["aio.EventLoop", "aio.UvloopEventLoop"])
def test_asyncio_s_workers_help_too(loop: str, tmp_path: Path) -> None:
    if "Uvloop" in loop:
        pytest.importorskip("uvloop")
    blocked = tmp_path / "blocked"
    program = f"""
import asyncio
from fastlisten import aio

async def answer(reader, writer):
    text = await reader.read(100)
    writer.write(b"%d %d" % (fastlisten.worker().number, os.getpid()))
    if text == b"block":
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # what a task has written leaves on the next turn
        open({str(blocked)!r}, "w").close()
        time.sleep(30)
    writer.close()

async def main(listener):
    server = await asyncio.start_server(answer, sock=listener)
    async with server:
        await server.serve_forever()

def target(listener):
    with asyncio.Runner(loop_factory={loop}) as runner:
        try:
            runner.run(main(listener))
        except asyncio.CancelledError:
            pass

fastlisten.Workers(target, '127.0.0.1:0', workers=2).run()
"""
    with parent(program) as server:
        server.workers(2)
        stuck = server.ask("block").pid
        wait_until(blocked.exists)  # it takes nobody any more
        for _ in range(30):
            assert server.ask().pid != stuck
        server.end(signal.SIGQUIT)


@slow_to_start
def test_a_coroutine_function_runs_on_an_event_loop_of_ours() -> None:
    program = """
import asyncio

async def answer(reader, writer):
    await reader.read(100)
    writer.write(b"%d %d" % (fastlisten.worker().number, os.getpid()))
    writer.close()

async def serve_on_it(listener):
    assert "fastlisten" in type(asyncio.get_running_loop()).__module__
    async with await asyncio.start_server(answer, sock=listener) as server:
        await server.serve_forever()

"""
    program += main("fastlisten.Workers(serve_on_it, '127.0.0.1:0', workers=2).run()")
    with parent(program) as server:
        server.workers(2)
        assert "Traceback" not in "\n".join(server.end())


def test_a_worker_that_dies_at_once_is_started_less_often_each_time() -> None:
    program = """
def target(listener):
    if fastlisten.worker().number == 1:
        sys.exit(3)
    return listener.serve(handler)

"""
    program += main("fastlisten.Workers(target, '127.0.0.1:0', workers=2).run()")
    with parent(program, until="ended with status 3; started again in 0.8 s") as server:
        told = [line.rpartition(" in ")[2] for line in server.lines if "ended with status 3" in line]
        assert told == ["0.1 s", "0.2 s", "0.4 s", "0.8 s"]
        assert server.ask().number == 0
        server.end()


@slow_to_start
def test_one_that_dies_later_is_started_at_once() -> None:
    with parent(main("fastlisten.Workers(serve, '127.0.0.1:0', workers=1).run()")) as server:
        served = time.monotonic()
        pid = server.ask().pid
        wait_until(lambda: time.monotonic() - served > 1.1)
        server.ask("exit 5")
        server.line_with(f"(process {pid}) ended with status 5; started again")
        assert " in " not in server.lines[-1]
        server.line_with("serves after")
        assert server.ask().pid != pid


@linux
def test_one_that_cannot_be_started_is_tried_again() -> None:
    program = """
import resource
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
signal.signal(TOLD, lambda *_: resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1])))
signal.signal(signal.SIGALRM, lambda *_: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()
"""
    with parent(program) as server:
        killed = server.workers(2)[1]
        server.send(TOLD)
        os.kill(killed, signal.SIGKILL)
        line = server.line_with("worker 1 cannot be started")
        assert line.endswith(f"{os.strerror(errno.EMFILE)}; started again in 1.0 s")
        server.send(signal.SIGALRM)
        server.line_with("serves after")
        assert server.workers(2)[1] != killed
        server.end()


UNREADY = """
def target(listener):
    if os.path.exists({flag!r}):
        {instead}
    return listener.serve(handler)

fastlisten.Workers(target, '127.0.0.1:0', workers=2, ready_timeout=0.5).run()
"""


@linux
@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("signal.pause()", "was not ready in 0.5 s"),
        ("sys.exit(4)", "ended with status 4 before it was ready"),
        ("raise ValueError('no')", "ended with status 1 before it was ready"),
    ],
)
def test_the_old_ones_stay_when_a_new_one_does_not_get_ready(tmp_path: Path, instead: str, said: str) -> None:
    flag = tmp_path / "broken"
    with parent(UNREADY.format(flag=str(flag), instead=instead)) as server:
        before = server.workers(2)
        flag.touch()
        server.send(signal.SIGHUP)
        line = server.line_with(said)
        assert line.endswith("the old one stays")
        assert server.workers(2) == before
        flag.unlink()
        server.send(signal.SIGHUP)
        server.line_with("serves after")
        server.end()


@linux
def test_a_worker_that_dies_while_its_successor_starts_in_vain_is_started_again(tmp_path: Path) -> None:
    flag, seen = tmp_path / "broken", tmp_path / "seen"
    instead = f"open({str(seen)!r}, 'w').close(); signal.pause()"
    with parent(UNREADY.format(flag=str(flag), instead=instead)) as server:
        before = server.workers(2)
        flag.touch()
        server.send(signal.SIGHUP)
        wait_until(seen.exists)
        os.kill(before[0], signal.SIGKILL)
        server.line_with(f"worker 0 (process {before[0]}) ended")
        flag.unlink()
        server.line_with("was not ready in 0.5 s")
        assert "started again" in server.lines[-1]
        server.line_with("serves after")
        assert server.workers(2)[0] != before[0]
        server.end()


@linux
def test_one_worker_more_and_one_less() -> None:
    with parent("fastlisten.Workers(serve, '127.0.0.1:0', workers=1).run()") as server:
        server.send(signal.SIGTTIN)
        server.line_with("serves after")
        workers = server.workers(2)
        server.send(signal.SIGTTOU)
        wait_until(lambda: gone(workers[1]))
        for _ in range(20):
            assert server.ask().number == 0
        server.send(signal.SIGTTOU)
        server.line_with("the last worker stays")  # of two signals that wait the lower number is seen first
        server.send(signal.SIGTTIN)
        server.line_with("serves after")
        assert server.workers(2)[0] == workers[0]
        server.end()


def test_a_parent_that_is_killed_takes_its_workers_along() -> None:
    with parent() as server:
        workers = server.workers(COUNT)
        server.ask("sleep 60")
        server.process.kill()
        server.process.wait(10)
        wait_until(lambda: all(map(gone, workers.values())))
        with fastlisten.bind(server.address):  # nobody has the port
            pass


@linux
def test_where_the_system_does_not_end_orphans_the_pipe_does() -> None:
    program = """
import fastlisten._workers.child as child
child.end_with_parent = lambda parent: False
fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()
"""
    with parent(program) as server:
        workers = server.workers(2)
        server.process.kill()
        wait_until(lambda: all(map(gone, workers.values())))


@linux
def test_as_on_a_system_that_has_none_of_it() -> None:
    """One listener for all, no pidfd, no PR_SET_PDEATHSIG, no look at the queues: macOS and the BSDs."""
    program = """
from fastlisten._core import processes
import fastlisten._workers.child as child

processes.BALANCES = False
del os.pidfd_open
child.end_with_parent = lambda parent: False
fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()
"""
    with parent(program) as server:
        before = server.workers(2)
        server.ask("sleep 60")  # the other one takes all
        assert len({server.ask().pid for _ in range(10)}) == 1
        server.send(signal.SIGHUP)
        server.line_with("serves after")
        server.line_with("serves after")
        wait_until(lambda: all(map(gone, before.values())))
        assert set(server.workers(2).values()).isdisjoint(before.values())
        killed = server.workers(2)[1]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: gone(killed))
        server.line_with("serves after")
        workers = server.workers(2)
        server.process.kill()
        wait_until(lambda: all(map(gone, workers.values())))


COUNTING = main("""
workers = fastlisten.Workers(serve, '127.0.0.1:0', workers=2)
signal.signal(TOLD, lambda *_: print(workers.stats(), flush=True))
workers.run()
""")


def test_the_counters_of_the_whole() -> None:
    with parent(COUNTING) as server:
        server.workers(2)
        server.ask("fork" if FORKS else "who")  # what ends in a fork of a worker is not counted there
        server.ask("exit 1")
        server.line_with("serves after")
        with server.connect() as client:
            client.sendall(b"say")
            assert client.recv(100)
            server.send(TOLD)
            stats = eval(
                server.line_with("WorkersStats"),
                {name: getattr(fastlisten, name) for name in fastlisten.__all__},
            )
        total, rows = stats
        assert len(rows) == 2
        assert total.active == sum(row.active for row in rows) == 1
        assert total.accepted == sum(row.accepted for row in rows) == total.handled + 1
        assert total.accepted >= 5
        if FORKS:
            assert total.queue_limit == sum(row.queue_limit for row in rows)
        server.end()


@linux
def test_clients_are_spread_evenly() -> None:
    with parent(COUNTING) as server:
        for _ in range(400):
            server.ask()
        server.send(TOLD)
        names = {name: getattr(fastlisten, name) for name in fastlisten.__all__}
        rows = eval(server.line_with("WorkersStats"), names).workers
        assert min(row.accepted for row in rows) > 100  # of 200 each; a machine may be busy
        server.end()


@linux
def test_a_parent_with_threads_starts_fresh_interpreters(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(HANDLER)
    program = """
import threading
import service
over = threading.Event()
threading.Thread(target=over.wait).start()
try:
    fastlisten.Workers(service.serve, '127.0.0.1:0', workers=2).run()
finally:
    over.set()
"""
    with parent(program, folder=tmp_path) as server:
        workers = server.workers(2)
        for pid in workers.values():
            assert b"fresh(" in Path(f"/proc/{pid}/cmdline").read_bytes()
        server.send(signal.SIGHUP)
        wait_until(lambda: all(map(gone, workers.values())))
        assert set(server.workers(2).values()).isdisjoint(workers.values())
        server.end()


@linux
def test_a_fresh_interpreter_that_never_reads_keeps_nobody_waiting(tmp_path: Path) -> None:
    """However much the target is: the parent goes on, and ends who is not ready in its time."""
    (tmp_path / "service.py").write_text(HANDLER + "\n\ndef sized(size, listener):\n    serve(listener)\n")
    stuck = tmp_path / "stuck"
    (tmp_path / "sitecustomize.py").write_text(  # what an interpreter imports first
        f"import os, signal\nif os.path.exists({str(stuck)!r}): signal.pause()\n"
    )
    program = """
import functools, threading
import service
over = threading.Event()
threading.Thread(target=over.wait).start()
target = functools.partial(service.sized, b"x" * 5_000_000)
try:
    fastlisten.Workers(target, '127.0.0.1:0', workers=2, ready_timeout=2.0).run()
finally:
    over.set()
"""
    environment = plain_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    with parent(program, folder=tmp_path, environment=environment) as server:
        workers = server.workers(2)
        stuck.touch()
        server.send(signal.SIGHUP)
        server.line_with("was not ready in 2 s")
        assert server.lines[-1].endswith("the old one stays")
        assert server.workers(2) == workers
        server.end()


@linux
def test_what_a_fresh_interpreter_cannot_have_is_told_before_anything_is_bound(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(
        "import os\nif os.path.exists('gone'): raise ValueError('no such')\n"
    )
    program = """
import threading, fastlisten, service
def serve(*listeners): pass
service.serve = serve
serve.__module__, serve.__qualname__ = "service", "serve"
open("gone", "w").close()
over = threading.Event()
threading.Thread(target=over.wait).start()
for target in (lambda listener: None, serve):
    try:
        fastlisten.Workers(target, "192.0.2.1:1", workers=1).run()  # which cannot be bound
    except (ValueError, RuntimeError) as error:
        print(error)
over.set()
"""
    done = run(program, folder=tmp_path)
    first, second = done.stdout.splitlines()
    assert "cannot be sent to a fresh interpreter" in first
    assert "cannot be imported in a worker: ValueError: no such" in second


@linux
def test_unix_sockets_and_several_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = f"""
def both(one, other):
    return fastlisten.serve(handler, one, other)

fastlisten.Workers(both, '127.0.0.1:0', 'unix:{path}', workers=2, backlog=50).run()
"""
    with parent(program) as server:
        server.workers(2)
        server.address = str(path)
        assert server.workers(2)
        server.send(signal.SIGHUP)
        server.line_with("serves after")
        server.line_with("serves after")
        assert server.workers(2)
        server.end()
    assert not path.exists()


@linux
def test_where_clients_cannot_be_steered_the_kernel_spreads_them() -> None:
    program = """
from fastlisten._core import processes

def refused(*arguments):
    raise PermissionError(1, "no")

processes.steer = refused
fastlisten.Workers(serve, '127.0.0.1:0', workers=3).run()
"""
    with parent(program) as server:
        server.workers(3)
        stuck = server.ask("sleep 30").pid
        for _ in range(30):
            assert server.ask().pid != stuck
        server.send(signal.SIGTTIN)
        server.line_with("serves after")
        server.end(signal.SIGQUIT)
        assert sum("cannot be steered" in line for line in server.lines) == 1


@slow_to_start
def test_serve_with_workers() -> None:
    program = "fastlisten.serve(handler, '127.0.0.1:0', workers=2, drain=3.0, threads=2, no_delay=True)"
    with parent(main(f"print({program})")) as server:
        server.workers(2)
        # The client that asked last may have its answer a moment before its handler has ended.
        assert {f"ServeResult(finished={n}, cut=0)" for n in (0, 1, 2)} & {*server.end()}


@slow_to_start
def test_a_listener_of_the_caller_s_is_shared_and_stays_open() -> None:
    program = """
with fastlisten.bind('127.0.0.1:0') as listener:
    fastlisten.serve(handler, listener, workers=2)
    print("open", listener.fileno() > 0)
"""
    with parent(main(program)) as server:
        server.workers(2)
        assert "open True" in server.end()


@linux
def test_nothing_is_left_in_the_parent() -> None:
    program = """
def opened():
    return sorted(os.listdir("/proc/self/fd"))

before, handlers = opened(), [signal.getsignal(number) for number in range(1, 32)]
fastlisten.Workers(serve, '127.0.0.1:0', workers=2).run()
assert opened() == before
assert [signal.getsignal(number) for number in range(1, 32)] == handlers
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("nobody")
"""
    with parent(program) as server:
        server.workers(2)
        server.send(signal.SIGHUP)
        server.line_with("serves after")
        server.line_with("serves after")
        assert server.end()[-1] == "nobody"


@linux
def test_the_first_process_of_a_container() -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0 or run([*unshare, "true"], status=None).returncode != 0:
        pytest.skip("needs to make a namespace of processes")
    program = """
def target(listener):
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            while os.getppid() != 1:
                pass
        os._exit(0)  # and so does an orphan, which the first process has to wait for
    os.waitpid(child, 0)
    return listener.serve(handler)

assert os.getpid() == 1
workers = fastlisten.Workers(target, '127.0.0.1:0', workers=2)
signal.signal(signal.SIGUSR1, lambda *_: print("zombies", zombies(), flush=True))

def zombies():
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    return sum(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z" for pid in pids)

workers.run()
"""
    variables = [f"{name}={value}" for name, value in sanitizers().items()]
    with parent([*unshare, "env", *variables, sys.executable, "-c", HANDLER + program]) as server:
        server.workers(2)
        first = children_of(server.process.pid)[0]

        def reaped() -> bool:
            os.kill(first, signal.SIGUSR1)
            return server.line_with("zombies") == "zombies 0"

        wait_until(reaped)
        os.kill(first, signal.SIGTERM)
        assert server.process.wait(10) == 0


# --- bad input


def target(*listeners: fastlisten.Listener) -> None:
    """Nobody calls it."""


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"workers": 0}, ValueError, "workers must be at least 1, not 0"),
        ({"workers": -3}, ValueError, "workers must be at least 1, not -3"),
        ({"workers": "many"}, ValueError, "workers must be a number or 'auto', not 'many'"),
        ({"workers": 1.5}, TypeError, "workers must be an int, not float"),
        ({"workers": None}, TypeError, "workers must be an int, not NoneType"),
        ({"workers": 10_000}, ValueError, "workers must be at most 500, not 10000"),
        ({"workers": 1, "drain": -1}, ValueError, "drain must be above 0, not -1"),
        ({"workers": 1, "ready_timeout": 0}, ValueError, "ready_timeout must be above 0, not 0"),
        ({"workers": 1, "reuse_port": True}, ValueError, "reuse_port"),
        ({"workers": 1, "backlog": "9"}, TypeError, None),
        ({"workers": 1, "nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_bad_options(options: dict[str, object], kind: type[Exception], said: str | None) -> None:
    with pytest.raises(kind, match=said):
        fastlisten.Workers(target, LOOPBACK, **options).run()  # type: ignore[arg-type]


@linux
def test_more_descriptors_than_there_may_be() -> None:
    program = """
import fastlisten, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    fastlisten.Workers(print, "127.0.0.1:0", workers=16)
except ValueError as error:
    print(error)
"""
    assert "descriptors, and this process may have 64" in run(program).stdout


def test_bad_endpoints() -> None:
    with pytest.raises(TypeError, match="at least one endpoint"):
        fastlisten.Workers(target, workers=1)
    with pytest.raises(ValueError, match="expected host:port"):
        fastlisten.Workers(target, "nonsense", workers=1).run()
    with pytest.raises(TypeError, match="target must be callable"):
        fastlisten.Workers("app:app", LOOPBACK, workers=1)  # type: ignore[arg-type]
    with fastlisten.bind(LOOPBACK) as taken, pytest.raises(OSError) as caught:  # noqa: PT011
        fastlisten.Workers(target, LOOPBACK, taken.endpoint, workers=2).run()
    assert caught.value.errno == errno.EADDRINUSE


@linux
def test_a_unix_path_in_use_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with fastlisten.bind(f"unix:{path}"):
        with pytest.raises(OSError, match="Address already in use"):
            fastlisten.Workers(target, f"unix:{path}", workers=2).run()
        assert path.exists()


@linux
def test_a_port_that_another_process_shares_with_whoever_asks_is_in_use() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="Address already in use"):
            fastlisten.Workers(target, other.getsockname(), workers=2).run()


@slow_to_start
def test_two_parents_at_one_port() -> None:
    with parent() as server:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            fastlisten.Workers(target, server.address, workers=2).run()
        assert caught.value.errno == errno.EADDRINUSE
        server.workers(COUNT)


@slow_to_start
def test_a_port_of_its_own_is_one_for_all() -> None:
    with parent() as server:
        assert server.address[1] != 0
        assert len(server.workers(COUNT)) == COUNT


def test_options_of_workers_without_workers() -> None:
    with pytest.raises(ValueError, match="drain is only meaningful with workers"):
        fastlisten.serve(print, LOOPBACK, drain=1.0)


def test_only_the_main_thread_runs_workers() -> None:
    program = """
import threading, fastlisten
def run():
    try:
        fastlisten.Workers(print, "127.0.0.1:0", workers=1).run()
    except RuntimeError as error:
        print(error)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    assert "main thread" in run(program).stdout


def test_nobody_pays_for_workers_who_has_none() -> None:
    program = "import fastlisten, sys; print([name for name in sys.modules if 'fastlisten._w' in name])"
    assert run(program).stdout == "[]\n"


def test_alive_is_what_the_helpers_say() -> None:
    assert alive(os.getpid())
    assert not gone(os.getpid())
