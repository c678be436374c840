"""Conditions with deadlines, and signals at intervals."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Long enough for a loaded machine, short enough that a hang is told by the test that caused it.
# The sanitizers make all of it slower.
LIMIT = 30.0 if "ASAN_OPTIONS" in os.environ else 10.0

# How often a condition is asked again; it is not a wait for something to have happened.
STEP = 0.002


def wait_until(condition: Callable[[], Any], deadline: float = LIMIT, what: str = "") -> Any:
    """Ask `condition` until it is true, for at most `deadline` seconds, and return its value."""
    end = time.monotonic() + deadline
    pause = threading.Event()  # never set: its wait is interrupted by signals, unlike a busy loop
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not true within {deadline} s: {what or condition}")
        pause.wait(STEP)
    return value


def asleep(task: str) -> bool:
    """Tell whether a process or a thread, by its folder in /proc, sleeps in a call; proc_pid_stat(5)."""
    with open(f"/proc/{task}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


@contextlib.contextmanager
def alarms(handler: Any, every: float) -> Iterator[None]:
    """Send a signal to this, the main thread every so many seconds, and have `handler` called.

    Until it raises: one more on the way out of the block would come out of whatever clears up there.
    """
    # Not SIGALRM: pytest-timeout's clock rings with that.
    number = signal.SIGUSR1
    quiet = False

    def answer(*arguments: Any) -> None:
        nonlocal quiet
        if quiet:
            return
        try:
            handler(*arguments)
        except BaseException:
            quiet = True
            raise

    before = signal.signal(number, answer)
    here, over = threading.get_ident(), threading.Event()

    def ring() -> None:
        while not quiet and not over.wait(every):
            signal.pthread_kill(here, number)

    ringing = threading.Thread(target=ring)
    ringing.start()
    try:
        yield
    finally:
        over.set()
        ringing.join()
        signal.signal(number, before)
