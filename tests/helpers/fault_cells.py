"""One system call fails, once or always, in one way of serving: what comes of it, and what is wrong then.

main(MODE), in a process under the library of faults.c, prints a Cell for each call, moment and number of
failures in which the call was made, as JSON.  With calls behind MODE only those fail.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, TypedDict

from helpers.fault_modes import BIG, MODES, OnServer, Served
from helpers.faults import FASTLISTENS, OTHERS, change_plan, given, meant_for
from helpers.server import Records
from helpers.sockets import connect
from helpers.waiting import LIMIT, wait_until

# Each call, as faults.c names it, and how it fails.
CALLS = {
    "accept": "EMFILE",
    "poll": "ENOMEM",
    "wake": "ENOMEM",
    "heard": "ENOMEM",
    "socketpair": "EMFILE",
    "ioctl": "ENOMEM",
    "fcntl": "EMFILE",
    "getsockopt": "ENOBUFS",
    "setsockopt": "ENOMEM",
    "shutdown": "ENOTCONN",
    "close": "EIO",
    "recv": "ENOMEM",
    "send": "ENOBUFS",
    "clock_gettime": "EINVAL",
    "poller": "EMFILE",
    "watch": "ENOSPC",
    "change": "ENOMEM",
    "unwatch": "ENOMEM",
    "ready": "ENOMEM",
    "malloc": "ENOMEM",
}
# And those of asyncio's own selector.
LOOPS_CALLS = {
    "loop's watch": "ENOSPC",
    "loop's change": "ENOMEM",
    "loop's unwatch": "ENOMEM",
}
# CPython does not start where this goes on failing.
ONCE_ONLY = {"clock_gettime"}
# Several are made for one client, and each of them is to fail: so many, at most.
EACH_IN_TURN = {"malloc"}
MOST_IN_TURN = 8
# When the call begins to fail: before the server is there, while it serves, or as it is told to stop.
BEGIN, SERVE, END = MOMENTS = "begin", "serve", "end"

# How long clients are waited for while a call always fails, in seconds.
PATIENCE = 0.03
# The longest pause is 0.1 s; the rest is for a machine that is busy with other things.
RECOVERED = 1.0

# A waker that goes on failing is told of once, and there are four at most; a shortage once an episode.
MOST_WARNINGS = 4

# What the log and an event loop's exception handler say, and the word for it.
WORDS = {
    "accepting pauses": "paused",
    "a wake-up failed": "mended",
    "the poller failed": "given up",
    "a client was dropped before a handler had it": "dropped",
    "Fatal error: the connection cannot be watched": "told",
    "accept() failed, the server takes no more clients from this socket": "told",
}


class Cell(TypedDict):
    """What came of it in words, what is wrong with it, and what is known beside."""

    outcomes: list[str]
    wrong: list[str]
    known: dict[str, Any]


class Client:
    """A client that says something once, and what it was told: "" as long as it has to wait.

    greeting: comes before that, half of it at once.
    """

    def __init__(self, address: Any, says: bytes = b"hello", greeting: bytes = b"") -> None:
        self.answer = ""
        half = len(greeting) // 2
        self._says = greeting[half:] + says
        self._much = says == b"big"
        self._got, self._wanted = 0, 5
        try:
            self.socket = connect(address)
        except OSError as error:  # refused already
            self.socket = socket.socket()
            self.answer = type(error).__name__
            return
        with contextlib.suppress(OSError):  # it is told when it speaks
            self.socket.sendall(greeting[:half])

    def speak(self) -> None:
        says, self._says = self._says, b""
        self._wanted = len(BIG) if self._much else 5
        try:
            self.socket.sendall(says)
        except OSError as error:
            self.answer = self.answer or type(error).__name__

    def listen(self, seconds: float) -> str:
        """Wait for the answer, at most so long; the client goes once it has it."""
        end = time.monotonic() + seconds
        try:
            while not self.answer:
                self.socket.settimeout(max(end - time.monotonic(), 0.001))
                part = self.socket.recv(1 << 20)
                self._got += len(part)
                if part == b"full":
                    self.answer = "full"  # it stays connected, and silent
                    return self.answer
                if not part:
                    self.answer = "less" if self._got else "end"
                elif self._got >= self._wanted:
                    self.answer = "all"
        except TimeoutError:
            return ""
        except OSError as error:
            self.answer = type(error).__name__
        self.socket.close()
        return self.answer


def patiently(client: Client, served: Served, seconds: float) -> None:
    """Wait for the answer so long, or until nobody is there to give one."""
    end = time.monotonic() + seconds
    while not client.listen(PATIENCE) and not served.ended() and time.monotonic() < end:
        pass


def come_while_it_fails(served: Served, busy: bool, seconds: float) -> list[Client]:
    """Have clients come: one that speaks late, one too many, one that wants much, one after a pause."""
    clients: list[Client] = []

    def come(says: bytes = b"hello") -> Client:
        before = served.stats().accepted
        clients.append(Client(served.address, says, served.greeting))
        with contextlib.suppress(AssertionError):  # nobody is accepted now
            wait_until(lambda: served.ended() or served.stats().accepted > before, min(seconds, PATIENCE))
        return clients[-1]

    first = come()
    if busy:
        too_many = come()
        too_many.listen(PATIENCE)
        too_many.speak()  # the first may have gone by now, and left the place to this one
    first.speak()
    patiently(first, served, seconds)
    if isinstance(served, OnServer):
        much = come(b"big")
        much.speak()
        patiently(much, served, seconds)
    served.pause_and_resume()
    last = come()
    last.speak()
    patiently(last, served, seconds)
    if busy:
        patiently(too_many, served, seconds)
    return clients


def fail(call: str, always: bool, after: int) -> None:
    """From now on the call fails, once or always, after so many that work."""
    meant_for(OTHERS if call in LOOPS_CALLS else FASTLISTENS)
    code = {**CALLS, **LOOPS_CALLS}[call]
    change_plan(**{call.removeprefix("loop's "): [(0, after), (code, 1 << 30 if always else 1)]})


def ask(served: Served) -> Client:
    client = Client(served.address, greeting=served.greeting)
    client.speak()
    client.listen(LIMIT)
    return client


def open_now() -> tuple[int, int]:
    """How many descriptors and threads this process has."""
    gc.collect()  # errors hold on to frames, in circles
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def ways_to_fail(call: str) -> Iterator[tuple[str, bool, int]]:
    """Give names of them, and what fail() wants to know."""
    yield "once", False, 0
    if call not in ONCE_ONLY:
        yield "always", True, 0
    if call in EACH_IN_TURN:
        for after in range(1, MOST_IN_TURN):
            yield f"once after {after}", False, after


def experience(mode: str, call: str, moment: str, always: bool, after: int, known: dict[str, Any]) -> None:
    """Serve in this mode and have the call fail; what happened is written into `known`."""
    served = MODES[mode]()
    clients: list[Client] = []
    if moment == BEGIN:
        served.at_beginning = lambda: fail(call, always, after)
    served.start()
    try:
        if moment != BEGIN:
            assert ask(served).answer == "all"
            wait_until(lambda: served.stats().active == 0)
            fail(call, always, after)
        if moment != END and served.address is not None:
            clients = come_while_it_fails(served, "busy" in mode, PATIENCE if always else LIMIT)
            known["answers"] = [client.answer for client in clients]
            change_plan()
            over = time.monotonic()
            for client in clients:
                client.speak()
                patiently(client, served, LIMIT)
            if not served.ended():
                clients.append(ask(served))
            known["recovered"] = time.monotonic() - over
            known["dropped"] = served.stats().dropped
        known["ended by itself"] = served.ended()
        served.stop()
        known["ends"] = served.join()
    finally:
        change_plan()
        served.close()
    known["in the end"] = [client.answer or client.listen(LIMIT) for client in clients]
    for client in clients:
        client.socket.close()
    if served.address is not None:
        stats = served.stats()
        known["active"], known["refused"] = stats.active, stats.refused
        known["left"] = stats.refused_for.get("left", 0)
    known["raised"] = [code_of(error) for error in served.raised]
    known["reported"] = served.reported


def code_of(error: BaseException) -> str:
    """Return the name of an error's code."""
    if isinstance(error, MemoryError):
        return "ENOMEM"
    return errno.errorcode.get(getattr(error, "errno", 0), repr(error))


def outcomes(known: dict[str, Any]) -> list[str]:
    """What came of it, in words."""
    told = [*known["reported"], *(text for level, text in known["log"] if level == "WARNING")]
    words = {WORDS.get(text.partition(",")[0].partition(":")[0], WORDS.get(text, text)) for text in told}
    if known["raised"]:
        words.add("raised")
    if known.get("left"):
        words.add("refused")
    unanswered = [answer for answer in known["in the end"] if answer != "all"]
    if not known["ended by itself"] and len(unanswered) > known["refused"] + known.get("dropped", 0):
        words.add("lost")
    return sorted(words)


def wrong(known: dict[str, Any], code: str, always: bool, before: tuple[int, int]) -> list[str]:
    """What must not be, whichever call fails."""
    found = []
    over = known["ended by itself"]
    if not known["ends"]:
        found.append("it does not end")
    if "" in known["in the end"]:
        found.append("somebody is stuck")
    if not over and not always and "" in known.get("answers", ()):
        found.append("somebody is stuck until the next client")
    if not over and known.get("recovered", 0) > RECOVERED:
        found.append("it recovers late")
    if known.get("active"):
        found.append("the books do not balance")
    if over and len(known["raised"]) != 1:
        found.append("it ends without an error, or with several")
    if set(known["raised"]) - {code}:
        found.append("it ends with another error")
    logged = [text for level, text in known["log"] if level == "WARNING"]
    if not always and len([*known["raised"], *known["reported"], *logged]) > 1:
        found.append("it is told more than once")
    if known.get("dropped") and not [*known["raised"], *known["reported"], *logged]:
        found.append("a client is dropped, and nobody is told")
    if len(logged) > MOST_WARNINGS:
        found.append("the log gets it again and again")
    try:
        wait_until(lambda: open_now() <= before, 1)
    except AssertionError:
        found.append(f"left open: {before} {open_now()}")
    return found


def main(mode: str, *calls: str) -> None:
    records = Records()
    logger = logging.getLogger("fastlisten")
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    gc.freeze()  # open_now() took most of its time to look through what is imported by now
    cells: dict[str, Cell] = {}
    for call, code in {**CALLS, **LOOPS_CALLS}.items():
        if calls and call not in calls:
            continue
        name = call.removeprefix("loop's ")
        for moment in MOMENTS:
            for way, always, after in ways_to_fail(call):
                records.kept.clear()
                before, failed = open_now(), given(name)
                known: dict[str, Any] = {}
                experience(mode, call, moment, always, after, known)
                known["log"] = [tuple(entry) for entry in records.kept]
                if given(name) == failed:
                    break  # it is not called
                cell = Cell(
                    outcomes=outcomes(known),
                    wrong=wrong(known, code, always, before),
                    known=known,
                )
                cells[f"{call}, {moment}, {way}"] = cell
    print(json.dumps(cells))
