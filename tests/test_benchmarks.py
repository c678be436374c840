"""The benchmark stays alive: it measures, checks answers, draws, compares and counts growth."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import LIMIT, needs, programs, wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads Linux's CPU clocks"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the load generator is built with cc"),
]

# Found, not imported: numpy starts threads of its own.
needs_extra = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rich", "matplotlib"))),
    reason="the extra fastlisten[bench] is not installed",
)

CLONE = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clone_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks` is not installed: it is imported from the clone."""
    monkeypatch.syspath_prepend(str(CLONE))


def run(*arguments: Any, **environment: Any) -> Any:
    return programs.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        environment={**os.environ, **environment},
        folder=CLONE,
        limit=50,
        status=None,
    )


def results_of(path: Any) -> Any:
    from benchmarks.results import Results

    return Results.read(path).summaries()


two_cores = pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="one core for each side"
)


@needs_extra
@two_cores
def test_a_tiny_run_prints_a_table_and_writes_json_and_pictures(tmp_path: Path) -> None:
    stem, path = tmp_path / "tiny-0.1", tmp_path / "tiny-0.1.json"  # the ".1" stays
    tiny = ("--quick", "--only", "close,socket.accept", "--rounds", 2, "--cpu", "0.02")
    answer = run(*tiny, "--out", stem)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "socket.accept" in answer.stdout
    assert "to the C loop" in answer.stdout
    result = json.loads(path.read_text())
    measured = {(s["workload"], s["server"], s["round"]) for s in result["samples"]}
    servers = ("c-accept", "socket.accept")
    assert measured == {("close", server, turn) for server in servers for turn in (0, 1)}
    for sample in result["samples"]:
        assert sample["figures"]["connections"] >= 200
        assert sample["figures"]["cpu_us"] > 0
    assert socket.gethostname() not in path.read_text()
    assert (tmp_path / "tiny-0.1.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "tiny-0.1.svg").read_text()
    again = run("--show", path, "--compare", path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "too few rounds" in again.stdout
    words = run("--readme", path, "--out", tmp_path / "picture").stdout
    assert "; `python -m benchmarks --only close --rounds 2 --cpu 0.02`." in words
    (row,) = (line for line in words.splitlines() if line.startswith("| socket.accept |"))
    (close,) = (s for s in results_of(path) if s.server == "socket.accept")
    assert row == f"| socket.accept | **{close.middle:.1f}** ({close.ratio:.2f}) |"
    assert (tmp_path / "picture.svg").exists()
    assert not (tmp_path / "picture.png").exists()


def write_run(
    path: Any, workload: Any = "close", values: Any = (1.0, 2.0), server: Any = "socket.accept"
) -> None:
    """Write the results of a run with such CPU times, without the C loop."""
    from benchmarks.results import Results, machine
    from benchmarks.runner import Sample, Settings

    samples = [Sample(workload, 64, server, turn, {"cpu_us": value}) for turn, value in enumerate(values)]
    Results.of(Settings(len(values), 0.1), machine(), samples, []).write(path)


MISTAKES = [
    (["--only", "close,nonesuch"], "--only: unknown: nonesuch"),
    (["--only", " shed, trio "], "--only: in none of the workloads: trio"),
    (["--rounds", "0"], "--rounds and --cpu must be above 0"),
    (["--cpu", "0"], "--rounds and --cpu must be above 0"),
    (["--cpu", "nan"], "--rounds and --cpu must be above 0"),
    (["--out", "nonesuch/stem"], "--out: nonesuch is not a folder"),
    (["--out", "{tmp}/taken"], "--out: {tmp}/taken.svg cannot be written"),
    (["--compare", "nonesuch.json"], "[Errno 2] No such file or directory: 'nonesuch.json'"),
    (["--show", "nonesuch.json"], "[Errno 2] No such file or directory: 'nonesuch.json'"),
    (["--readme", "nonesuch.json"], "[Errno 2] No such file or directory: 'nonesuch.json'"),
    (["--readme", "{tmp}/shed.json"], "{tmp}/shed.json: the run has none of close, echo, http"),
    (["--quick", "--compare", "{tmp}/shed.json"], "--compare: the two runs have no workload"),
    (["--show", "{tmp}/close.json", "--compare", "{tmp}/shed.json"], "--compare: the two runs have no"),
    *(
        ([option, f"{{tmp}}/{name}.json"], f"{{tmp}}/{name}.json is not a result of this benchmark: ")
        for option in ("--compare", "--show", "--readme")
        for name in ("torn", "other", "part", "figure")
    ),
]


@needs_extra
@two_cores
@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_told_before_anything_is_measured(
    arguments: Any,
    line: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks import __main__ as command

    (tmp_path / "torn.json").write_text('{"x":')
    (tmp_path / "other.json").write_text('{"schema": 2}')
    (tmp_path / "part.json").write_text('{"schema": 1}')
    (tmp_path / "taken.svg").mkdir()
    write_run(tmp_path / "close.json")
    write_run(tmp_path / "shed.json", "shed")
    text = (tmp_path / "shed.json").read_text().replace("cpu_us", "cost")
    (tmp_path / "figure.json").write_text(text)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit) as end:
        command.main([word.format(tmp=tmp_path) for word in arguments])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(line.format(tmp=tmp_path))
    assert told.count("\n") == 1


@needs_extra
@two_cores
def test_what_is_not_installed_is_told_once_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "gcc").symlink_to(shutil.which("gcc") or shutil.which("cc") or "")
    for tool in ("as", "ld"):  # gcc looks for them in the path
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    tiny = ("--quick", "--only", "http-ab,close,socket.accept", "--rounds", 1, "--cpu", "0.01")
    answer = run(*tiny, PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path))  # no git, no ab, no cc
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("left out: http-ab, which needs ab\n") == 1
    assert "socket.accept" in answer.stdout
    answer = run("--only", "http-ab", PATH=str(tmp_path))
    assert (answer.returncode, answer.stderr) == (2, "--only: nothing is left to measure\n")
    answer = run(*tiny, CC="nonesuch")
    told = "load.c needs the command 'nonesuch', which is not there ($CC names another)\n"
    assert (answer.returncode, answer.stderr) == (2, told)


@needs_extra
@two_cores
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_the_server_and_keeps_the_samples(name: Any, tmp_path: Path) -> None:
    number = getattr(signal, name)
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("whoever runs the tests has it ignored, as nohup does")
    options = ("--only", "close,go", "--rounds", "1", "--cpu", "100", "--out", str(tmp_path / "cut"))
    command = [sys.executable, "-m", "benchmarks", *options]
    with programs.running(command, folder=CLONE) as process:
        server, _ = wait_until(lambda: server_and_load(process.pid), LIMIT, "server and load run")
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "failed: interrupted after 0 of" in out
    wait_until(lambda: not Path(f"/proc/{server}").exists(), LIMIT, "the server has ended")
    assert json.loads((tmp_path / "cut.json").read_text())["samples"] == []


def server_and_load(pid: Any) -> Any:
    """Return the benchmark's two children that do the work "close", once both are there."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    both = [child for child in children if " close" in command_line(child)]
    return both if len(both) == 2 else None


def command_line(pid: Any) -> Any:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):  # it has ended, before the open or before the read
        return ""


def test_a_split_needs_seconds_of_cpu() -> None:
    from benchmarks.results import Results
    from benchmarks.runner import Sample

    def parts(seconds: Any) -> Any:
        figures = {"cpu_us": 10.0, "connections": seconds * 1e5, "user_ticks": 25, "system_ticks": 75}
        samples = [Sample("close", 64, "go", turn, figures) for turn in range(2)]
        (row,) = Results("", {}, {}, samples, []).summaries()
        return row.user, row.system

    assert parts(0.75) == (2.5, 7.5)
    assert parts(0.7) == (0, 0)


@needs_extra
def test_growth_with_clients_is_told() -> None:
    from benchmarks.report import growth
    from benchmarks.results import Results
    from benchmarks.runner import Sample

    samples = [
        Sample("concurrency", clients, server, 0, {"cpu_us": cost})
        for server, costs in (("go", (9, 20, 23)), ("trio", (9, 20, 23.2)))
        for clients, cost in zip((1, 64, 10_000), costs, strict=True)
    ]
    assert growth(Results("", {}, {}, samples, []).summaries()) == [
        "go: 10,000 clients cost 1.15 of 64 each, flat within 1.15",
        "trio: 10,000 clients cost 1.16 of 64 each, not flat within 1.15",
    ]


@needs_extra
def test_figures_without_a_ratio_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from benchmarks.report import compare
    from benchmarks.results import Results

    for name, values in (("old", (5, 6, 7, 8, 9)), ("new", (1, 2, 3, 4, 4.5))):
        write_run(tmp_path / name, values=values)
    old, new = (Results.read(tmp_path / name) for name in ("old", "new"))
    assert compare(old, new, Console(width=120))
    row = next(line for line in capsys.readouterr().out.splitlines() if "socket.accept" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][3:] == ["7 µs", "3 µs", "better", "0.008"]


@needs_extra
def test_ours_and_the_others_differ_in_colour_without_a_split_too(tmp_path: Path) -> None:
    """The samples of a quick run are too short to tell user from system."""
    from benchmarks.results import Results, machine
    from benchmarks.runner import Sample, Settings

    servers = ("c-accept", "socket.accept", "fastlisten-serve", "uvloop-protocol")
    samples = [Sample("close", 64, server, 0, {"cpu_us": 1.0}) for server in servers]
    Results.of(Settings(1, 0.1), machine(), samples, []).write(tmp_path / "run.json")
    answer = run("--show", tmp_path / "run.json", "--out", tmp_path / "picture")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    drawn = (tmp_path / "picture.svg").read_text()
    assert [drawn.count(f"fill: {colour}") for colour in ("#5aae61", "#7f9cc0")] == [1 + 1, 3 + 1]  # + legend


@needs_extra
def test_bars_of_a_group_stand_side_by_side_the_best_first() -> None:
    from benchmarks.picture import GAP, places
    from benchmarks.results import Results
    from benchmarks.runner import Sample

    costs = {"TCPServer": 5, "asyncio-protocol": 9, "fastlisten-asyncio-protocol": 4, "c-accept": 1}
    samples = [Sample("close", 64, server, 0, {"cpu_us": float(cost)}) for server, cost in costs.items()]
    assert [(place, row.server) for place, row in places(Results("", {}, {}, samples, []).summaries())] == [
        (0, "c-accept"),
        (1 + GAP, "TCPServer"),
        (2 + 2 * GAP, "fastlisten-asyncio-protocol"),
        (3 + 2 * GAP, "asyncio-protocol"),
    ]


@needs_extra
def test_the_burst_is_told_by_four_percentiles(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from benchmarks.report import show
    from benchmarks.results import Results, machine
    from benchmarks.runner import Sample

    figures = {"p50_ms": 11.0, "p99_ms": 22.0, "p999_ms": 33.0, "last_ms": 44.0}
    show(Results("", {}, machine(), [Sample("burst", 4000, "go", 0, figures)], []), Console(width=120))
    out = capsys.readouterr().out
    assert re.search(r"p50 .* p99 .* p99\.9 .* last ", out)
    assert re.search(r"go .* 11 .* 22 \(22 to 22\) .* 33 .* 44 ", out)


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        (b"hello, fastlisten\n", True),
        (b"hello, fastlistem\n", False),
        (b"hello, fastlisten", False),
        (b"hello, fastlisten\n\n", False),
        (b"", False),
    ],
    ids=["right", "another byte", "too short", "too long", "nothing"],
)
def test_the_load_generator_checks_every_answer(answer: Any, fine: Any) -> None:
    from benchmarks.runner import load_command

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for reply in (b"hello, fastlisten\n", answer):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        command = load_command("echo", listener.getsockname()[1], 0, 0, 2, 1)
        result = programs.run(command, status=None)
        thread.join(20)
    assert result.returncode == (0 if fine else 1)
    if fine:
        assert json.loads(result.stdout)["answers"] == 2
    else:
        assert result.stderr == "load: answer: wrong (after 1 answers)\n"


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"
SHORT = WHOLE.replace(b"hello", b"hallo")


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([WHOLE[:20], WHOLE[20:], WHOLE], ""),
        ([SHORT], "load: answer: wrong (after 0 answers)\n"),
        ([WHOLE, SHORT], "load: answer: wrong (after 1 answers)\n"),
        ([WHOLE[:20]], "load: the server has closed: wrong (after 0 answers)\n"),
    ],
    ids=["in parts", "another byte", "another byte at last", "closed"],
)
def test_the_load_generator_asks_again_on_a_connection(answers: Any, told: Any) -> None:
    """Two requests, of which the last one asks the server to close; answers may come in parts."""
    from benchmarks.runner import load_command

    asked = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            nonlocal asked
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                for answer in answers:
                    if answer != WHOLE[20:]:
                        asked += connection.recv(1000)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        command = load_command("request", listener.getsockname()[1], 0, 0, 2, 1, requests=2)
        result = programs.run(command, status=None)
        thread.join(20)
    assert (result.returncode, result.stderr) == (bool(told), told)
    if not told:
        assert json.loads(result.stdout)["answers"] == 2
        first, last, rest = asked.split(b"\r\n\r\n")
        assert (last, rest) == (first + b"\r\nConnection: close", b"")


LASTING = [
    ("fastlisten-EventLoop-uvicorn", "request", 10, 0),
    ("fastlisten-UvloopEventLoop-aiohttp", "request", 1, 0),
    ("aiofastnet-uvloop-aiohttp", "request", 10, 0),
    ("fastlisten-UvloopEventLoop-protocol", "message", 0, 64),
    ("fastlisten-EventLoop-streams", "message", 0, 256 * 1024),
    ("aiofastnet-asyncio-protocol", "message", 0, 4096),
]


@pytest.mark.parametrize(("name", "work", "requests", "size"), LASTING, ids=[case[0] for case in LASTING])
def test_a_server_answers_often_on_a_connection(name: Any, work: Any, requests: Any, size: Any) -> None:
    """Every loop's way of being made and both frameworks' programs are tried with the real package."""
    from benchmarks.runner import load_command, running
    from benchmarks.servers import SERVERS

    if missing := SERVERS[name].missing():
        pytest.skip(f"needs {missing}")
    with running(SERVERS[name], work, None) as server:
        command = load_command(work, server.port, 0, 0, 95, 4, requests=requests, size=size)
        result = programs.run(command, status=None)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["answers"] == (100 if requests == 10 else 95)


@needs("the openssl command")
@pytest.mark.parametrize("workload", ["tls-64", "tls-64k", "tls-new"])
def test_a_server_answers_over_tls(workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.runner import Cell, load_tls, running
    from benchmarks.servers import SERVERS
    from benchmarks.workloads import WORKLOADS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the certificate is made
    server = SERVERS["fastlisten-EventLoop-protocol"]
    with running(server, "tls", None) as started:
        answers, cpu = load_tls(started, Cell(WORKLOADS[workload], 3, server), 20)
    assert (answers, cpu > 0) == (18, True)


@needs("the openssl command")
@pytest.mark.parametrize(
    ("workload", "name"),
    [
        ("tls-silent", "fastlisten-serve-tls"),
        ("tls-silent", "fastlisten-EventLoop-handshake_threads"),
        ("tls-storm", "fastlisten-EventLoop-handshake_threads"),
    ],
)
def test_it_is_measured_how_long_a_client_of_tls_waits(
    workload: Any, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import runner
    from benchmarks.servers import SERVERS
    from benchmarks.workloads import WORKLOADS

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the certificate is made
    for constant, few in {"WARM_UP": 20, "TURNS": 1, "ECHOES": 10, "HANDSHAKES": 2, "STORMS": 1}.items():
        monkeypatch.setattr(runner, constant, few)
    cell = runner.Cell(WORKLOADS[workload], 3, SERVERS[name])
    with runner.running(cell.server, "tls", None) as started:
        figures = runner.METHODS[cell.workload.method](started, cell, runner.Settings(1, 1), {})
    assert figures.keys() >= set(cell.workload.columns)
    assert all(value > 0 for value in figures.values())


def test_the_load_generator_ends_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import runner

    monkeypatch.setattr(runner, "LOAD_LIMIT", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts nobody
        command = runner.load_command("close", listener.getsockname()[1], 0, 0, 1, 1)
        result = programs.run(command, status=None)
    assert result.returncode == 1
    assert result.stderr.startswith("load: time limit")


@pytest.mark.parametrize(
    ("old", "new", "chance"),
    [
        # Of 252 ways to choose five of ten, two are this extreme.
        ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10), 2 / 252),
        # Of 6 ways to choose two of four: {1,2} and {3,4} are 2, {1,3} and {2,4} are 4 of 6.
        ((1, 2), (3, 4), 2 / 6),
        ((1, 3), (2, 4), 4 / 6),
        ((1, 4), (2, 3), 1),
        # All equal: nothing is more extreme than anything else.
        ((1, 1, 1), (1, 1, 1), 1),
        # Ranks 1.5, 1.5, 3: the sum for the single value is 3 in one of three ways.
        ((1, 1), (2,), 1 / 3),
    ],
)
def test_the_rank_test_counts_exactly(old: Any, new: Any, chance: Any) -> None:
    from benchmarks.results import rank_test

    assert rank_test(old, new) == pytest.approx(chance)
    assert rank_test(new, old) == pytest.approx(chance)


def test_rounds_are_interleaved_over_servers() -> None:
    from benchmarks.runner import Cell, plan
    from benchmarks.servers import SERVERS
    from benchmarks.workloads import WORKLOADS

    names = ("c-accept", "socket.accept", "gevent")
    cells = [Cell(WORKLOADS[work], 64, SERVERS[name]) for work in ("close", "echo") for name in names]
    order = plan(cells, 5, seed=1)
    assert len(order) == 5 * len(cells)
    for start in range(0, len(order), 3):  # every group of three holds each server once
        group = order[start : start + 3]
        assert len({(turn, cell.group) for turn, cell in group}) == 1
        assert {cell.server.name for _, cell in group} == set(names)
    assert [turn for turn, _ in order] == sorted(turn for turn, _ in order)
    by_group = [cell.group for _, cell in plan(cells, 5, seed=1, by_group=True)]
    assert by_group == [("close", 64)] * 15 + [("echo", 64)] * 15


@two_cores
@pytest.mark.parametrize("alive", [False, True])
def test_a_server_is_started_for_each_sample_or_for_its_group(
    alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import runner
    from benchmarks.servers import SERVERS
    from benchmarks.workloads import WORKLOADS

    seen = []

    def measure(server: runner.Running, *_: Any) -> dict[str, float]:
        seen.append(server.process)
        return {}

    monkeypatch.setitem(runner.METHODS, WORKLOADS["close"].method, measure)
    one, two = (runner.Cell(WORKLOADS[work], 64, SERVERS["socket.accept"]) for work in ("close", "echo"))
    with contextlib.closing(runner.Sampler(runner.Settings(2, 0.1, alive=alive))) as sampler:
        for turn, cell in enumerate((one, one, two)):
            sample = sampler.take(turn, cell)
            assert (sample.workload, sample.round) == (cell.workload.name, turn)
        running = [process for process in seen if process.poll() is None]
        assert running == seen[2:] * alive
    assert len(set(seen)) == 3 - alive
    assert all(process.poll() is not None for process in seen)


BATCHES = """
import select, socket
with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    while True:
        select.select([listener], [], [])
        clients = []
        try:
            while True:
                clients.append(listener.accept()[0])
        except BlockingIOError:
            print(len(clients), flush=True)
        for client in clients:
            with client:
                client.setblocking(True)
                client.sendall(client.recv(100))
"""


def test_clients_to_be_counted_come_in_whole_batches() -> None:
    """A count of instructions does not depend on who had a core when."""
    from benchmarks.instructions import CLIENTS, come_at_once
    from benchmarks.runner import Running

    with programs.running(BATCHES) as process:
        server = Running(process, int(programs.line_of(process)))
        for _ in range(20):
            come_at_once(server, b"hello")
            assert int(programs.line_of(process)) == CLIENTS


@pytest.mark.parametrize(("grown", "status"), [(1.01, 0), (1.03, 1)])
def test_a_count_that_grew_fails_the_check(
    grown: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import instructions

    record = json.loads(instructions.RECORD.read_text())
    counts = {work: dict(servers) for work, servers in record["3.13"]["counts"].items()}
    counts["echo"]["fastlisten-serve"] = round(counts["echo"]["fastlisten-serve"] * grown)
    monkeypatch.setattr(instructions, "minor", lambda: "3.13")
    monkeypatch.setattr(instructions, "build_facts", lambda: record["3.13"])
    monkeypatch.setattr(instructions, "compiler_version", lambda _: "there")
    monkeypatch.setattr(instructions, "count_all", lambda: counts)
    assert instructions.main(["--check"]) == status
    assert ("allowed +2%" in capsys.readouterr().out) == bool(status)


def test_a_server_says_what_it_lacks() -> None:
    from benchmarks.servers import Server

    def lacks(*needs: Any) -> Any:
        return Server("x", "native", "program", (), frozenset(), "", needs).missing()

    assert lacks() == lacks("sh", "json.decoder") == ""
    assert lacks("json.nonesuch", "sh", "nonesuch") == "json.nonesuch, nonesuch"
    assert lacks("nonesuch.module") == "nonesuch.module"


@pytest.mark.parametrize("name", ["fastlisten-socket", "fastlisten-ThreadingHTTPServer"])
def test_a_drop_in_answers_each_connection(name: Any) -> None:
    from benchmarks.runner import load_command, running
    from benchmarks.servers import SERVERS

    with running(SERVERS[name], "http", None) as server:
        command = load_command("http", server.port, 0, 0, 100, 10)
        result = programs.run(command, status=None)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["answers"] == 100


def test_a_busy_server_refuses_with_a_reset() -> None:
    from benchmarks.runner import running
    from benchmarks.servers import SERVERS

    with running(SERVERS["fastlisten-busy"], "shed", None) as server:
        for _ in range(3):
            with (
                pytest.raises(ConnectionResetError),  # it may come before connect() returns
                socket.create_connection(("127.0.0.1", server.port), 20) as client,
            ):
                client.recv(1)


@needs_extra
def test_rounds_end_before_the_limit() -> None:
    from benchmarks.__main__ import too_late

    order: list[tuple[int, Any]] = [(turn, None) for turn in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert not too_late(order, 2, 100, 10), "a round that began is finished"
    assert not too_late(order, 3, 5, 10)
    assert too_late(order, 3, 5.1, 10), "two rounds would take 10.2 s"
    assert too_late(order, 6, 7, 10), "three rounds would take 10.5 s"


def test_an_aim_is_a_ratio_of_the_same_round() -> None:
    """The median of go is 8, that of trio 4: a ratio of 2."""
    from benchmarks.aims import Aim
    from benchmarks.results import Results
    from benchmarks.runner import Sample

    costs = {"go": (2.0, 20.0, 8.0), "trio": (4.0, 40.0, 4.0, 1.0)}
    samples = [
        Sample("echo", 64, server, turn, {"cpu_us": cost})
        for server, rounds in costs.items()
        for turn, cost in enumerate(rounds)
    ]
    results = Results("", {}, {}, samples, [])
    told = "| echo | go | trio | 0.50 | 0.50 (0.50 to 1.25; 0.50 to 2.00) | reached |"
    assert Aim("echo", "go", "trio", 0.5).line(results) == told
    assert Aim("echo", "go", "trio", 0.49).line(results).endswith("| **missed** |")
    assert Aim("echo", "go", "trio", 0.5, clients=1).line(results) == ""


def test_what_is_aimed_at_can_be_measured() -> None:
    from benchmarks.aims import AIMS
    from benchmarks.workloads import WORKLOADS

    for aim in AIMS:
        workload = WORKLOADS[aim.workload]
        assert {aim.server, aim.against} <= {server.name for server in workload.choose(frozenset())}
        assert aim.clients in workload.concurrency


def test_growth_is_told_by_counts_on_one_build_and_by_ratios_on_another() -> None:
    from benchmarks.instructions import complaints

    recorded = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_000}}
    fine = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_039}}
    grown = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_050}}
    slower_build = {"close": {"socket.accept": 30_000, "fastlisten-serve": 3_000}}
    grown_there = {"close": {"socket.accept": 30_000, "fastlisten-serve": 3_600}}
    assert complaints(recorded, fine, same=True) == []
    assert complaints(recorded, grown, same=True) == [
        "close fastlisten-serve: 2,050 instructions, was 2,000: +2.5%, allowed +2%"
    ]
    assert complaints(recorded, slower_build, same=False) == []
    assert len(complaints(recorded, slower_build, same=True)) == 1
    assert len(complaints(recorded, grown_there, same=False)) == 1


def test_the_import_is_weighed_against_that_of_socket(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import importing

    assert importing.main(["--rounds", "2"]) == 0
    base, more, difference = map(float, re.findall(r"(-?\d+\.\d) ms", capsys.readouterr().out))
    assert base > 0  # which is the greater, two rounds on a busy machine do not tell
    assert difference == pytest.approx(more - base, abs=0.2)  # with two rounds the medians are means
