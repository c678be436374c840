"""The benchmark stays alive: it measures, checks answers, draws, compares and counts growth."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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
def clone_on_path(monkeypatch):
    """`benchmarks` is not installed: it is imported from the clone."""
    monkeypatch.syspath_prepend(str(CLONE))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=CLONE,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def results_of(stem):
    from benchmarks.results import Results

    return Results.read(stem.with_suffix(".json")).summaries()


@needs_extra
@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2, reason="one core for each side"
)
def test_a_tiny_run_prints_a_table_and_writes_json_and_pictures(tmp_path):
    stem = tmp_path / "tiny"
    tiny = ("--quick", "--only", "close,socket.accept", "--rounds", 2, "--cpu", "0.02")
    answer = run(*tiny, "--out", stem)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "socket.accept" in answer.stdout
    assert "to the C loop" in answer.stdout
    result = json.loads(stem.with_suffix(".json").read_text())
    measured = {(s["workload"], s["server"], s["round"]) for s in result["samples"]}
    servers = ("c-accept", "socket.accept")
    assert measured == {("close", server, turn) for server in servers for turn in (0, 1)}
    for sample in result["samples"]:
        assert sample["figures"]["connections"] >= 200
        assert sample["figures"]["cpu_us"] > 0
    assert socket.gethostname() not in stem.with_suffix(".json").read_text()
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in stem.with_suffix(".svg").read_text()
    again = run("--show", stem.with_suffix(".json"), "--compare", stem.with_suffix(".json"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "too few rounds" in again.stdout
    words = run("--readme", stem.with_suffix(".json"), "--out", tmp_path / "picture").stdout
    (row,) = (line for line in words.splitlines() if line.startswith("| socket.accept |"))
    (close,) = (s for s in results_of(stem) if s.server == "socket.accept")
    assert row == f"| socket.accept | **{close.middle:.1f}** ({close.ratio:.2f}) |"
    assert (tmp_path / "picture.svg").exists()
    assert not (tmp_path / "picture.png").exists()


@needs_extra
def test_an_unknown_name_is_refused():
    answer = run("--only", "close,nonesuch")
    assert answer.returncode == 1
    assert answer.stderr.strip() == "--only: unknown: nonesuch"
    answer = run("--only", "shed,trio")
    assert answer.returncode == 1
    assert answer.stderr.strip() == "--only: in none of the workloads: trio"


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
def test_the_load_generator_checks_every_answer(answer, fine):
    from benchmarks.runner import load_command

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            for reply in (b"hello, fastlisten\n", answer):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        command = load_command("echo", listener.getsockname()[1], 0, 0, 2, 1)
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        thread.join(20)
    assert result.returncode == (0 if fine else 1)
    if fine:
        assert json.loads(result.stdout)["connections"] == 2
    else:
        assert result.stderr == "load: answer: wrong (after 1 answers)\n"


def test_the_load_generator_ends_at_its_time_limit(monkeypatch):
    from benchmarks import runner

    monkeypatch.setattr(runner, "LOAD_LIMIT", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts nobody
        command = runner.load_command("close", listener.getsockname()[1], 0, 0, 1, 1)
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
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
def test_the_rank_test_counts_exactly(old, new, chance):
    from benchmarks.results import rank_test

    assert rank_test(old, new) == pytest.approx(chance)
    assert rank_test(new, old) == pytest.approx(chance)


def test_rounds_are_interleaved_over_servers():
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


@pytest.mark.parametrize(("again", "status"), [([2_300, 2_010], 0), ([2_300, 2_200], 1)])
def test_a_count_that_grew_is_counted_again_and_the_least_is_believed(again, status, monkeypatch, capsys):
    from benchmarks import instructions

    record = json.loads(instructions.RECORD.read_text())
    counts = {work: dict(servers) for work, servers in record["3.13"]["counts"].items()}
    was = counts["echo"]["fastlisten-serve"]
    counts["echo"]["fastlisten-serve"] = 2 * was
    answers = [was * n // 2_000 for n in again]
    monkeypatch.setattr(instructions, "minor", lambda: "3.13")
    monkeypatch.setattr(instructions, "build_facts", lambda: record["3.13"])
    monkeypatch.setattr(instructions, "compiler_version", lambda _: "there")
    monkeypatch.setattr(instructions, "count_all", lambda: counts)
    monkeypatch.setattr(instructions, "count", lambda *_: answers.pop(0))
    assert instructions.main(["--check"]) == status
    assert answers == []
    assert ("allowed +5%" in capsys.readouterr().out) == bool(status)


def test_a_server_says_what_it_lacks():
    from benchmarks.servers import Server

    def lacks(*needs):
        return Server("x", "native", "program", (), frozenset(), "", needs).missing()

    assert lacks() == lacks("sh", "json.decoder") == ""
    assert lacks("json.nonesuch", "sh", "nonesuch") == "json.nonesuch, nonesuch"
    assert lacks("nonesuch.module") == "nonesuch.module"


@pytest.mark.parametrize("name", ["fastlisten-socket", "fastlisten-ThreadingHTTPServer"])
def test_a_drop_in_answers_each_connection(name):
    from benchmarks.runner import load_command, running
    from benchmarks.servers import SERVERS

    with running(SERVERS[name], "http", None) as server:
        command = load_command("http", server.port, 0, 0, 100, 10)
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["connections"] == 100


def test_a_busy_server_refuses_with_a_reset():
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
def test_rounds_end_before_the_limit():
    from benchmarks.__main__ import too_late

    order = [(turn, None) for turn in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert not too_late(order, 2, 100, 10), "a round that began is finished"
    assert not too_late(order, 3, 5, 10)
    assert too_late(order, 3, 5.1, 10), "two rounds would take 10.2 s"
    assert too_late(order, 6, 7, 10), "three rounds would take 10.5 s"


def test_growth_is_told_by_counts_on_one_build_and_by_ratios_on_another():
    from benchmarks.instructions import complaints

    recorded = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_000}}
    fine = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_099}}
    grown = {"close": {"socket.accept": 20_000, "fastlisten-serve": 2_110}}
    slower_build = {"close": {"socket.accept": 30_000, "fastlisten-serve": 3_000}}
    grown_there = {"close": {"socket.accept": 30_000, "fastlisten-serve": 3_600}}
    assert complaints(recorded, fine, same=True) == {}
    assert complaints(recorded, grown, same=True) == {
        ("close", "fastlisten-serve"): (
            "close fastlisten-serve: 2,110 instructions, was 2,000: +5.5%, allowed +5%"
        )
    }
    assert complaints(recorded, slower_build, same=False) == {}
    assert len(complaints(recorded, slower_build, same=True)) == 1
    assert len(complaints(recorded, grown_there, same=False)) == 1


def test_the_import_is_weighed_against_that_of_socket(capsys):
    from benchmarks import importing

    assert importing.main(["--rounds", "2"]) == 0
    base, more, difference = map(float, re.findall(r"(\d+\.\d) ms", capsys.readouterr().out))
    assert more > base
    assert difference == pytest.approx(more - base, abs=0.2)  # with two rounds the medians are means
