"""A server process that tests steer line by line: `python -m helpers.server [OPTION=VALUE ...]`.

It prints its port, then answers each line of input with one line of JSON. Options are those of
serve() as Python literals, and `fd=N` for a listener that it inherits.
"""

import ast
import contextlib
import json
import logging
import mmap
import os
import signal
import sys
import threading
import time
from typing import Any

import fastlisten
from helpers import Serving, echo, wait_until


def is_open(number: int) -> bool:
    """Tell, without a descriptor to do it with, whether this one is open."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class Records(logging.Handler):
    """Keeps what was logged, as [level, text]."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append([record.levelname, record.getMessage()])


def hold(connection: Any) -> None:
    """Note the client's line and echo it; "hold PATH" keeps the GIL until a file's first byte is not 0."""
    line = connection.recv(1000)
    if line.startswith(b"hold "):
        with open(line[5:], "rb") as file, mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as let_go:
            connection.sendall(b"holding")
            end = time.monotonic() + 20
            while not let_go[0] and time.monotonic() < end:  # neither of them gives the GIL up
                pass
        return
    seen.append(line.decode())
    connection.sendall(line)


def answer(connection: Any) -> None:
    """Send the first message back and hang up."""
    connection.sendall(connection.recv(100))


def sheds(error: OSError, attempt: int) -> float:
    seen.append([error.errno, attempt])
    return 0.02


def slow_pause(error: OSError, attempt: int) -> float:
    seen.append([error.errno, attempt])
    threading.Event().wait(0.05)  # never set: longer than the first pauses of a loop that does not ask
    return 0


def a_minute(error: OSError, attempt: int) -> float:
    return 60


def gives_up(error: OSError, attempt: int) -> float:
    if attempt == 3:
        raise RuntimeError(f"gave up: {error}")
    return 0.001


def bad_pause(error: OSError, attempt: int) -> Any:
    return "soon"


def negative_pause(error: OSError, attempt: int) -> float:
    return -1


def no_pause(error: OSError, attempt: int) -> float:
    return float("nan")


def endless_pause(error: OSError, attempt: int) -> float:
    return float("inf")


seen: list[Any] = []
HANDLERS = (answer, echo, hold)
PAUSES = (sheds, slow_pause, a_minute, gives_up, bad_pause, negative_pause, no_pause, endless_pause)
NAMED: dict[str, Any] = {f.__name__: f for f in (*HANDLERS, *PAUSES)}


class Server:
    """What the commands do; each returns what JSON can hold."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.records = Records()
        logger = logging.getLogger("fastlisten")
        logger.addHandler(self.records)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        handler = NAMED[options.pop("handler", "echo")]
        if isinstance(options.get("exhausted"), str):
            options["exhausted"] = NAMED.get(options["exhausted"], options["exhausted"])
        endpoint = f"fd:{options.pop('fd')}" if "fd" in options else ("127.0.0.1", 0)
        self.listener = fastlisten.bind(endpoint, backlog=options.pop("backlog", None))
        self.files: list[int] = []
        if "switch" in options:  # a handler that computes gives the GIL up this seldom, in seconds
            sys.setswitchinterval(options.pop("switch"))
        if options.pop("start", True):
            self.served = Serving(lambda: self.listener.serve(handler, **options))

    def fill(self) -> int:
        """Open files until every descriptor is open.

        None is left to have before that, while accept() has one in hand for a client it may not find.
        """
        wait_until(self.fill_once)
        return len(self.files)

    def fill_once(self) -> bool:
        with contextlib.suppress(OSError):
            while True:
                self.files.append(os.dup(0))
        return all(map(is_open, range(os.sysconf("SC_OPEN_MAX"))))

    def free(self) -> float:
        """Close one of them, and tell when that was."""
        os.close(self.files.pop())
        return time.monotonic()

    def empty(self) -> None:
        while self.files:
            os.close(self.files.pop())

    def cpu(self) -> float:
        return time.process_time()

    def logs(self) -> list[list[str]]:
        return self.records.kept

    def seen(self) -> list[Any]:
        return seen

    def threads(self) -> int:
        return len(os.listdir("/proc/self/task"))

    def stats(self) -> dict[str, Any]:
        return self.listener.stats()._asdict()

    def usage(self) -> dict[str, int]:
        """Tell what a leak would take more of: bytes resident, descriptors, threads."""
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        return {
            "resident": pages * os.sysconf("SC_PAGE_SIZE"),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": self.threads(),
        }

    def pause(self) -> None:
        self.listener.pause()

    def resume(self) -> None:
        self.listener.resume()

    def stop(self, *drain: str) -> Any:
        """Stop, wait and tell: [seconds it took, what serve() returned] or the error's text."""
        begun = time.monotonic()
        self.listener.stop(*[float(seconds) for seconds in drain])
        return self.wait(begun)

    def wait(self, begun: float | None = None) -> Any:
        begun = time.monotonic() if begun is None else begun
        try:
            result = self.served.wait(20)
        except AssertionError:
            raise
        except Exception as error:
            return [time.monotonic() - begun, f"{type(error).__name__}: {error}"]
        return [time.monotonic() - begun, list(result)]


def main() -> None:
    options = {}
    for argument in sys.argv[1:]:
        name, value = argument.split("=", 1)
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    if "nofile" in options:
        import resource

        limit = options.pop("nofile")
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    server = Server(options)
    signal.signal(signal.SIGTERM, lambda *_: server.listener.stop(drain=10))
    print(server.listener.getsockname()[1], flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        try:
            answer = {"answer": getattr(server, name)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    server.listener.close()
    if hasattr(server, "served"):
        server.served.thread.join(10)


if __name__ == "__main__":
    main()
