"""USDT probes: which are in the extension modules, and what gdb and bpftrace see of them."""

import json
import os
import re
import select
import sys
import sysconfig
from collections import Counter
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import fastlisten
from fastlisten._core import state
from helpers import LIMIT, connect, exchange, needs, read_all, wait_until
from helpers.programs import interpreter, line_of, plain_environment, run, running
from helpers.usdt import probes_in

PROBES = probes_in(state.__file__)

pytestmark = pytest.mark.skipif(not PROBES, reason="needs probes in the build: SystemTap's sys/sdt.h")

EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
SCRIPTS = Path(str(files("fastlisten") / "probes"))


def document() -> str:
    """Return what OPERATION.md says of probes."""
    text = (Path(__file__).parent.parent / "OPERATION.md").read_text(encoding="utf-8")
    return text.partition("\n## Probes\n")[2]


def test_the_build_has_the_probes_of_the_document() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", document(), re.MULTILINE)
    assert {name: arguments.count(",") + 1 for name, arguments in rows} == PROBES


def test_all_probes_are_in_one_module() -> None:
    """So that whoever looks has one path to give."""
    folder = Path(fastlisten.__file__).parent
    modules = [path for path in folder.rglob(f"*{EXTENSION}") if probes_in(path)]
    assert modules == [Path(state.__file__)]


def test_the_scripts_and_the_document_know_the_reasons() -> None:
    accepts, refusals = [(SCRIPTS / f"{name}.bt").read_text() for name in ("accepts", "refusals")]
    assert set(re.findall(r"fastlisten:(\w+)", accepts + refusals)) <= set(PROBES)
    reasons = re.findall(r'@reasons\[(-?\d+)\] = "(.*)";', refusals)
    assert reasons == [("-1", "busy"), *((str(i), name) for i, name in enumerate(state.REFUSALS))]
    assert ", ".join(map(" ".join, reasons)) in " ".join(document().split())


# The address in a sockaddr_in, as a number.
ADDRESS = "*(unsigned int *)((char *)$_probe_arg2 + 4)"


def gdb_script() -> str:
    """Return what has gdb print a line for each probe that is passed, once the program has stopped itself."""
    lines = ["set pagination off", "set print thread-events off", "set debuginfod enabled off"]
    lines += ["handle SIGUSR1 stop nopass", "run"]
    for name, count in PROBES.items():
        arguments = [f"(long)$_probe_arg{i}" for i in range(count)]
        if name == "refuse":
            arguments[2] = ADDRESS
        form = " ".join(["SEEN", name, *["%ld"] * count])
        print_them = f'printf "{form}\\n", {", ".join(arguments)}'
        lines += [f"break -probe-stap fastlisten:{name}", "commands", "silent", print_them, "continue", "end"]
    return "\n".join([*lines, "continue", ""])


@needs("the gdb command", "calls that go to libc")
def test_gdb_sees_each_client_and_its_fate(tmp_path: Path) -> None:
    """By every way to serve: as many as are counted, and each by the descriptor with which it came."""
    script = tmp_path / "script"
    script.write_text(gdb_script())
    gdb = ["gdb", "-nx", "-batch", "-iex", "set auto-load off", "-x", str(script), "--args"]
    told = tmp_path / "told"
    done = run([*gdb, *interpreter(), "-m", "helpers.probed", str(told)], environment=plain_environment())
    assert "exited normally" in done.stdout, done.stdout + done.stderr
    came: dict[int, int] = {}  # descriptors of clients, and of the listeners whose queue they were in
    seen: Counter[tuple[int, str]] = Counter()
    for line in re.findall("^SEEN (.*)$", done.stdout, re.MULTILINE):
        name, *words = line.split()
        numbers = [int(word) for word in words]
        if name == "accept":
            listener, client = numbers
            assert client not in came
            came[client] = listener
        elif name.startswith("drain"):
            listener = numbers[0]
            assert numbers[1:] in ([], [20_000])
        else:
            listener = came.pop(numbers[0])
        if name == "refuse":
            name = "busy" if numbers[1] == -1 else state.REFUSALS[numbers[1]]
            assert numbers[2].to_bytes(4, sys.byteorder) == bytes([127, 0, 0, 1])
        seen[listener, name] += 1
    counted: Counter[tuple[int, str]] = Counter()
    for way, (fd, accepted, handled, refused_for, dropped) in json.loads(told.read_text()).items():
        counted.update({(fd, "accept"): accepted, (fd, "hand_over"): handled, (fd, "drop"): dropped})
        counted.update({(fd, reason): number for reason, number in refused_for.items()})
        if way in ("overload", "asyncios", "asyncios_overload"):
            counted.update({(fd, "drain_begin"): 1, (fd, "drain_end"): 1})
    assert seen == +counted
    assert {name for _, name in seen} == {*PROBES, "busy", "denied"} - {"refuse"}


SERVER = """
import fastlisten
from helpers import echo
with fastlisten.bind("127.0.0.1:0") as listener:
    print(listener.getsockname()[1], listener.fileno(), flush=True)
    listener.serve(echo, admission=fastlisten.Admission(deny=["127.0.0.2"]))
"""


@needs("bpftrace, and leave to use it")
def test_the_scripts_run_on_a_server() -> None:
    with running(SERVER) as server:
        port, fd = map(int, line_of(server).split())
        commands = [
            ["bpftrace", "-p", str(server.pid), str(SCRIPTS / name), state.__file__]
            for name in ("accepts.bt", "refusals.bt")
        ]
        with running(commands[0]) as accepts, running(commands[1]) as refusals:
            out: dict[str, str] = {"accepts": "", "refusals": ""}
            address = ("127.0.0.1", port)

            def told(line: str, script: Any, name: str) -> bool:
                assert exchange(address) == b"ping"
                with connect(address, source=("127.0.0.2", 0)) as denied, suppress(ConnectionResetError):
                    read_all(denied)
                while select.select([script.stdout], [], [], 0)[0]:
                    out[name] += os.read(script.stdout.fileno(), 1 << 16).decode()
                return line in out[name]

            wait_until(lambda: told(f"@accepted[{server.pid}, {fd}]: ", accepts, "accepts"))
            wait_until(lambda: told(f" {server.pid:<8} denied ", refusals, "refusals"))
            server.kill()  # with the process that they watch they end; not each SIGINT does it
            rest = accepts.communicate(timeout=LIMIT)[0] + refusals.communicate(timeout=LIMIT)[0]
    assert re.search(r"^[\d:]{8} \d+ +denied +127\.0\.0\.2:\d+$", out["refusals"] + rest, re.MULTILINE)
    assert re.search(rf"^@waited\[{server.pid}, {fd}\]: *$", rest, re.MULTILINE)
