"""serve(): bind and serve in one call, in this process or in several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlisten._bind import Address, bind, bind_status, passed_connection
from fastlisten._endpoint import endpoint_of
from fastlisten._listener import Listener, ServeResult, make_loop, serve_options
from fastlisten._options import BindOptions, StatusOptions, WorkerOptions, declared

if TYPE_CHECKING:
    from typing import Unpack

    from fastlisten._listener import Handler
    from fastlisten._options import AllOptions


def serve(handler: Handler, *endpoints: Address | Listener, **options: Unpack[AllOptions]) -> ServeResult:
    """Bind the endpoints and serve them in one loop, with one set of threads and limits, in turn.

    endpoints: as bind() takes them; Listeners are served too and stay open.  What serve() bound it closes,
    after a stop when nobody more is taken, while handlers end: who comes then is refused.
    workers: serve them so in as many processes, as Workers does it, with its drain and ready_timeout; a
    number, or "auto"; without watchdog, as their parent feeds the service manager's.  status: an endpoint
    where whoever asks is told about the service: by HTTP, GET /metrics, /healthz and /readyz, and by
    HAProxy's agent-check, with `agent-send "agent\n"`.  It is for a network of one's own: who asks needs no
    leave, and can change nothing.  A thread answers, or the parent of the workers.  The other arguments are
    those of bind() and of Listener.serve().  Where "systemd:" or "inetd:" alone is a client's connection and
    no listening socket, this client is served, and serve() returns.  stop() of any of the listeners ends the
    loop; workers are ended by a signal.  Returns and raises as Listener.serve(), or as Workers.run().

    >>> import fastlisten, socket
    >>> with fastlisten.bind("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
    ...     fastlisten.serve(lambda connection: listener.stop(), listener, "127.0.0.1:0")
    ServeResult(finished=1, cut=0)
    """
    given: dict[str, Any] = {**options}
    binding, telling, working = (
        {name: given.pop(name) for name in declared(family) if given.get(name, family) is not family}
        for family in (BindOptions, StatusOptions, WorkerOptions)
    )
    status = None if telling.get("status") is None else endpoint_of(telling["status"])
    serving = serve_options(handler, **given)
    if not endpoints:
        raise TypeError("serve() needs at least one endpoint")
    if working.get("workers") is not None:
        from fastlisten._workers.workers import Workers, serve_target  # only for who asks for them

        if serving.watchdog is not None:
            raise ValueError("watchdog: the parent of workers feeds the service manager's by itself")
        return Workers(serve_target(handler, given), *endpoints, status=status, **working, **binding).run()
    for name in working.keys() - {"workers"}:
        raise ValueError(f"{name} is only meaningful with workers")
    if len(endpoints) == 1 and not isinstance(endpoints[0], Listener):
        where = endpoint_of(endpoints[0])
        client = passed_connection(where)
        if client is not None and status is not None:
            client.close()
            raise ValueError(f"status is for listening, and {where} is a client's connection")
        if client is not None:
            from fastlisten._inherited import serve_connection

            return serve_connection(client, handler, serving)
        endpoints = (where,)
    bound: list[Listener] = []
    try:
        listeners = []
        for endpoint in endpoints:
            if not isinstance(endpoint, Listener):
                endpoint = bind(endpoint, **binding)
                endpoint._close_when_emptied()
                bound.append(endpoint)
            listeners.append(endpoint)
        loop = make_loop(listeners, handler, serving)
        if status is None:
            return ServeResult(*loop.run())
        from fastlisten._status.thread import StatusThread  # only for who asks for it

        with StatusThread(bind_status(status), listeners):
            return ServeResult(*loop.run())
    finally:
        for listener in reversed(bound):
            listener.close()
