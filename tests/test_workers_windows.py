"""Worker processes on Windows: the console's keys, which go to all of them and are the parent's."""

import json
import os
import subprocess
import sys

import pytest

from helpers import not_under_wine

pytestmark = pytest.mark.skipif(os.name != "nt", reason="Windows has consoles; elsewhere signals are sent")

# Presses a key in a console of its own, once or twice: the event goes to all processes of the console.
PRESS = """
import ctypes, json, signal, socket, subprocess, sys

kernel = ctypes.WinDLL("kernel32", use_last_error=True)
kernel.FreeConsole()
if not kernel.AllocConsole():
    raise ctypes.WinError(ctypes.get_last_error())
for number in (signal.SIGINT, signal.SIGBREAK):
    signal.signal(number, signal.default_int_handler)  # a process that ignores them has children that do


def press():
    for number in (signal.SIGINT, signal.SIGBREAK):
        signal.signal(number, signal.SIG_IGN)
    if not kernel.GenerateConsoleCtrlEvent(getattr(signal, sys.argv[1]), 0):
        raise ctypes.WinError(ctypes.get_last_error())


def line_with(text):
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return line


command = [sys.executable, "-m", "fastlisten", "serve", "127.0.0.1:0", "--workers", "2"]
with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
    try:
        port = int(line_with("listening on").rpartition(":")[2])
        line_with("all workers serve")
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(b"one")
            assert client.recv(9) == b"one"
            press()
            line_with("draining for at most 5 s")
            if sys.argv[2] == "once":
                client.sendall(b"more")
                assert client.recv(9) == b"more"
            else:
                press()
                line_with("draining for at most 0 s")
                try:
                    assert client.recv(9) == b""
                except ConnectionResetError:
                    pass
        output, errors = process.communicate(timeout=20)
    except BaseException:
        process.kill()
        raise
print(json.dumps([process.returncode, output, errors]))
"""


@pytest.mark.parametrize(
    ("event", "ends"),
    [
        ("CTRL_C_EVENT", 130),
        pytest.param("CTRL_BREAK_EVENT", 0, marks=not_under_wine("it has no event for Ctrl-Break")),
    ],
)
@pytest.mark.parametrize("times", ["once", "twice"])
def test_a_key_ends_with_a_drain_and_the_second_now(event: str, ends: int, times: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRESS, event, times], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    status, output, errors = json.loads(done.stdout)
    assert (status, errors) == (ends, "")
    name = "SIGINT" if ends else "SIGBREAK"
    assert f"stopped by {name}: {'1 finished, 0' if times == 'once' else '0 finished, 1'} cut" in output
