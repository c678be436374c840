"""A serve() that runs in a thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from helpers.waiting import LIMIT


def echo(connection: Any) -> None:
    """Send back all that comes until the client ends; a handler."""
    while data := connection.recv(1 << 16):
        connection.sendall(data)


class Serving:
    """A serve() that runs in a thread: its thread, and its result or error once it has ended."""

    def __init__(self, target: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._target = target
        self.thread = threading.Thread(target=self._run, name="serving")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._target()
        except BaseException as error:  # handed to whoever waits, see wait()
            self.error = error

    def wait(self, deadline: float = LIMIT) -> Any:
        """Wait for serve() to end by itself; return what it returned or raise what it raised."""
        self.thread.join(deadline)
        if self.thread.is_alive():
            raise AssertionError(f"serve() has not ended within {deadline} s")
        if self.error is not None:
            error, self.error = self.error, None  # the context manager does not raise it again
            raise error
        return self.result


@contextlib.contextmanager
def serving(listener: Any, handler: Any, **options: Any) -> Iterator[Serving]:
    """Run `listener.serve(handler, **options)` in a thread; stop and join it at the end.

    What serve raised comes out at the end, unless wait() has given it out before. The listener
    stays open: it is the caller's.
    """
    served = Serving(lambda: listener.serve(handler, **options))
    try:
        yield served
    finally:
        # A stop after the end would make a later serve() return at once, so ask first.
        if served.thread.is_alive():
            listener.stop()
            served.thread.join(LIMIT)
        if served.thread.is_alive():  # a handler waits for its client: cut it, then say so
            listener.stop(drain=0)
            served.thread.join(LIMIT)
            raise AssertionError("serve() did not end on stop(); its handlers had to be cut")
    served.wait(0)
