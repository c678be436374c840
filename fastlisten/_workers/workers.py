"""Workers: from a target and endpoints to processes that serve them."""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from fastlisten._bind import Address, status_options
from fastlisten._endpoint import Endpoint, endpoint_of
from fastlisten._events import Tick
from fastlisten._listener import Listener, ListenerStats, ServeResult, make_loop, serve_options
from fastlisten._options import BindOptions, Checked, WorkerOptions, checked
from fastlisten._workers.child import Target
from fastlisten._workers.handover import Inheritance
from fastlisten._workers.manager import Manager, notifier
from fastlisten._workers.memory import MOST_ENDPOINTS, Memory
from fastlisten._workers.parent import Parent
from fastlisten._workers.pool import Pool, Starter
from fastlisten._workers.programs import Programs
from fastlisten._workers.sockets import Members, name_of
from fastlisten._workers.start import Forked, can_fork
from fastlisten._workers.totals import Totals, WorkerProcess, WorkersStats

if TYPE_CHECKING:
    from typing import Unpack

    from fastlisten._listener import Handler
    from fastlisten._workers.status import StatusPort

_log = logging.getLogger("fastlisten")

DEFAULT_DRAIN = 5.0  # seconds
DEFAULT_READY_TIMEOUT = 30.0  # seconds

# A steering program and a parent's memory are small for so many, and select(), which waits for their channels
# on Windows, takes 512 sockets; more processes than this are a mistake.
MOST_WORKERS = 500

# What a parent has open beside the listeners and two descriptors a worker process, of which each worker may
# have two.
_OTHER_DESCRIPTORS = 32


class Supervised:
    """Workers of any kind; a subclass says how they begin, and whether they write their counters."""

    counts = True
    controlled = False  # by the status port; the command asks for it

    def __init__(
        self,
        *endpoints: Address | Listener,
        workers: int | str,
        drain: float | None = None,
        ready_timeout: float | None = None,
        lame_duck: float | None = None,
        status: Address | None = None,
        **bind_options: Unpack[BindOptions],
    ) -> None:
        if not endpoints:
            raise TypeError("Workers() needs at least one endpoint")
        if len(endpoints) > MOST_ENDPOINTS:
            raise ValueError(f"endpoints: {len(endpoints)} are more than {MOST_ENDPOINTS}")
        own = checked(
            WorkerOptions,
            "Workers",
            workers=workers,
            drain=DEFAULT_DRAIN if drain is None else drain,
            ready_timeout=DEFAULT_READY_TIMEOUT if ready_timeout is None else ready_timeout,
            lame_duck=lame_duck,
        )
        self._status_where = None if status is None else endpoint_of(status)
        if own.lame_duck and status is None:
            raise ValueError("lame_duck is only meaningful with status")
        if own.workers is None:
            raise TypeError("workers must be an int, not NoneType")
        self._bind_options = checked(BindOptions, "Workers", **bind_options)
        if self._bind_options.reuse_port:
            raise ValueError("reuse_port: the workers' listeners share the port anyway, and with nobody else")
        _check_limits(own.workers, len(endpoints))
        self._where = endpoints
        self._options = own
        self._endpoints: list[Members] = []
        self._status: Members | None = None
        self._binding: Address | Listener | None = None  # what run() binds just now, or could not
        self._pool: Pool | None = None
        self._inheritance: Inheritance | None = None
        self._totals = Totals()
        self._ticks: list[tuple[float, Callable[[], None]]] = []

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where run() listens, with the port that the system chose; empty before."""
        return tuple(members.endpoint for members in self._endpoints)

    @property
    def status_endpoint(self) -> Endpoint | None:
        """Where the parent answers who asks about the service; None without `status`, and before run()."""
        return None if self._status is None else self._status.endpoint

    def run(self) -> ServeResult:
        """Bind, start the workers, and keep them running until a signal ends that.

        SIGTERM, after `lame_duck`, and SIGINT: end with the drain; the second one, and SIGQUIT: end now.
        SIGHUP: replace the workers one by one, each when the new one is ready.  SIGTTIN and SIGTTOU: one
        worker more, and one less.  SIGUSR2: start this program again, by its command, with the listeners; end
        when that one's workers serve, and go on if they do not in `ready_timeout`.

        A service manager (NOTIFY_SOCKET) is told when all workers serve, are replaced and end, and how many
        clients they have; its watchdog is fed while that comes on.  Workers are not told of it.

        Returns what the drain let finish and what it cut, of the workers that ended so in all the time.
        Raises OSError as bind(), RuntimeError outside the main thread and for a target that a fresh
        interpreter cannot import, ValueError for one that cannot be sent there.  No worker is left then.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("workers are run by the main thread, which has the signals")
        starter = self._starter()
        count = self._options.workers + starter.spare
        with closing(starter), self._bound(count) as endpoints, notifier() as told:
            # Each may be replaced while the one before still drains, and be added and taken away meanwhile.
            most = MOST_WORKERS if hasattr(signal, "SIGTTIN") else self._options.workers
            memory = Memory(len(endpoints), 4 * most, named=starter.named)
            try:
                starter.serves(endpoints, memory)
                status = self._status_port()
                parent = Parent(
                    endpoints,
                    starter,
                    memory,
                    self._options,
                    self._tell,
                    self._totals.gone,
                    Manager(told, self._listening(), self._total if starter.counts else None),
                    [Tick(*tick) for tick in self._ticks],
                    self._inheritance,
                    status,
                )
                if status is not None and self.controlled:
                    from fastlisten._workers.control import ParentControl  # only for who asks for it

                    status.obey(ParentControl(parent, self.counts))
                self._pool = parent.pool
                self._started()
                return parent.run()
            finally:
                self._pool = None
                memory.close()

    @contextmanager
    def _bound(self, count: int) -> Iterator[list[Members]]:
        """The listeners of all endpoints; what was bound is closed at the end."""
        self._endpoints, self._status = [], None
        inheritance = self._inheritance = Inheritance.from_environment()
        try:
            for where in self._where:
                self._binding = where
                members = inheritance and inheritance.take(name_of(where), self._bind_options)
                self._endpoints.append(members or Members(where, self._bind_options))
                self._endpoints[-1].grow(count)
            if self._status_where is not None:
                self._binding = self._status_where
                options = status_options(self._status_where)
                members = inheritance and inheritance.take(name_of(self._status_where), options)
                self._status = members or Members(self._status_where, options)
            self._binding = None
            yield self._endpoints
        finally:
            if inheritance is not None:
                inheritance.close()
            if self._status is not None:
                self._status.close()
            for members in reversed(self._endpoints):
                members.close()

    def _status_port(self) -> StatusPort | None:
        if self._status is None:
            return None
        from fastlisten._workers.status import StatusPort  # only for who asks for it

        return StatusPort(self._status, self, self.stats)

    def _started(self) -> None:
        """The endpoints are bound."""
        self._tell("listening", self._listening(), endpoints=[str(one) for one in self.endpoints])
        if self._status is not None:
            self._tell("status", f"status on {self.status_endpoint}", endpoint=str(self.status_endpoint))

    def _listening(self) -> str:
        return f"listening on {', '.join(map(str, self.endpoints))}"

    def _tell(self, event: str, text: str, warning: bool = False, **values: Any) -> None:
        """What happens: to the log."""
        _log.log(logging.WARNING if warning else logging.INFO, "%s", text, extra={"event": event, **values})

    # --- the counters ---------------------------------------------------------------------------------

    def stats(self) -> WorkersStats:
        """The counters of all workers and of each, as they are now: they lie in memory that this process
        reads.

        They are those of the workers' Listeners, as Listener.stats() has them; `queue_depth` and
        `queue_limit` are of a Listener of each worker, or of the one that all share.  Any thread of the
        parent may call it.
        """
        return self._totals.stats(self._pool, self._endpoints)

    def processes(self) -> tuple[WorkerProcess, ...]:
        """Whether each worker serves, and how many processes were started for it; none before they begin,
        nor when they have ended.  Any thread of the parent may call it."""
        places = () if self._pool is None else self._pool.places
        return tuple(
            WorkerProcess(place.number, bool(place.current and place.current.ready), place.starts)
            for place in list(places)
        )

    def _total(self) -> ListenerStats:
        return self.stats().total

    def _starter(self) -> Starter:
        raise NotImplementedError


class Workers(Supervised):
    """Processes that serve the same endpoints, and a parent that replaces them without losing a client.

    target: called in each worker with its Listeners, one for each endpoint; when it returns, or raises, the
    worker ends.  A coroutine function is run on an aio.EventLoop.  What is to end a worker stops its
    Listeners: serve() returns then, iteration ends, asyncio servers of fastlisten close, each with the
    drain.
    endpoints: as bind() takes them.  Each is bound once a worker, where the system spreads the clients of a
    port over its listeners, and once for all elsewhere; with port 0 all have the same one.
    workers: how many; "auto" is one a usable core.
    drain: how many seconds a worker that is to end has for the clients that it has and that are queued; 5.
    ready_timeout: how many seconds a worker has to serve all its Listeners, or to call worker().ready(); 30.
    One that has not is ended, and the one that it was to replace stays.
    status: where the parent answers who asks about the service, as serve() says it; and whoever asks before a
    worker serves, or after SIGTERM, is told that it is not ready.
    lame_duck: for how many seconds after SIGTERM that is told while clients are still served, so that nobody
    is sent here any more when the drain begins; a second SIGTERM ends the wait.  0.
    bind_options: as bind(), without reuse_port.

    Workers are forks of this process where that is safe: where it has no other thread.  Else they are fresh
    interpreters, to which the target goes by its name, as multiprocessing's "spawn" does it.

    Raises TypeError and ValueError for what cannot be meant, before a socket opens.

    >>> import fastlisten
    >>> def target(listener):
    ...     listener.serve(print, threads=4)
    >>> fastlisten.Workers(target, "127.0.0.1:0", workers=0)
    Traceback (most recent call last):
    ...
    ValueError: workers must be at least 1, not 0
    """

    def __init__(
        self,
        target: Target,
        *endpoints: Address | Listener,
        workers: int | str,
        drain: float | None = None,
        ready_timeout: float | None = None,
        lame_duck: float | None = None,
        status: Address | None = None,
        **bind_options: Unpack[BindOptions],
    ) -> None:
        if not callable(target):
            raise TypeError(f"target must be callable, not {type(target).__name__}")
        super().__init__(
            *endpoints,
            workers=workers,
            drain=drain,
            ready_timeout=ready_timeout,
            lame_duck=lame_duck,
            status=status,
            **bind_options,
        )
        self._target = target

    def _starter(self) -> Starter:
        """How they begin; what cannot be is told here, before anything is bound."""
        if can_fork():
            return Forked(self._target, self._options.drain)
        from fastlisten._workers.fresh import Fresh  # much to import, and only for who needs it

        return Fresh(self._target, self._options.drain)


class ProgramWorkers(Supervised):
    """Workers that are another program: `command` and its arguments, as Programs takes them."""

    counts = False

    def __init__(
        self,
        command: Sequence[str],
        *endpoints: Address | Listener,
        workers: int | str,
        drain: float | None = None,
        ready_timeout: float | None = None,
        lame_duck: float | None = None,
        status: Address | None = None,
        **bind_options: Unpack[BindOptions],
    ) -> None:
        super().__init__(
            *endpoints,
            workers=workers,
            drain=drain,
            ready_timeout=ready_timeout,
            lame_duck=lame_duck,
            status=status,
            **bind_options,
        )
        self._command = command

    def _starter(self) -> Programs:
        return Programs(self._command)


def _check_limits(workers: int, endpoints: int) -> None:
    """ValueError when there can be no so many."""
    if workers > MOST_WORKERS:
        raise ValueError(f"workers must be at most {MOST_WORKERS}, not {workers}")
    try:
        import resource  # of POSIX
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = workers * (endpoints + 4) + _OTHER_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise ValueError(f"workers={workers} need {needed} descriptors, and this process may have {limit}")


def serve_target(handler: Handler, options: dict[str, Any]) -> Target:
    """What serves listeners with a handler in each worker; options: of serve()."""
    serve_options(handler, **options)
    return functools.partial(_serve, handler, options)


def _serve(handler: Handler, options: dict[str, Any], *listeners: Listener) -> ServeResult:
    checked_options: Checked = serve_options(handler, **options)
    return ServeResult(*make_loop(listeners, handler, checked_options).run())
