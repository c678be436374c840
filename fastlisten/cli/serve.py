"""`fastlisten serve`: bind, serve until a signal."""

from __future__ import annotations

import argparse
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import fastlisten
from fastlisten import Connection, Endpoint, Listener
from fastlisten._bind import passed_connection
from fastlisten._listener import serve_options
from fastlisten.cli import log
from fastlisten.cli.arguments import (
    ADMISSION_OPTIONS,
    BIND_OPTIONS,
    DEFAULT_ENDPOINT,
    SERVE_OPTIONS,
    STATUS_OPTIONS,
    given,
)
from fastlisten.cli.errors import FAILED, INTERRUPTED, MISUSED, CommandError
from fastlisten.cli.failures import as_option, binding, read_endpoint
from fastlisten.cli.handlers import BUILT_IN, load_handler
from fastlisten.cli.manager import notifier, ready, stopping
from fastlisten.cli.report import Advice, LogLines, Report
from fastlisten.cli.status import status_endpoint, status_thread

if TYPE_CHECKING:
    from fastlisten import Admission, Notifier, Proxy
    from fastlisten._status.thread import StatusThread


def serve_command(options: argparse.Namespace) -> int:
    """Bind, tell where, serve until a signal, tell how it ended; returns the exit status."""
    if options.endpoint in BUILT_IN:
        text = f"{options.endpoint} is a handler and needs an endpoint before it"
        raise CommandError(f"{text}: {DEFAULT_ENDPOINT} {options.endpoint}", MISUSED)
    endpoint = read_endpoint(options.endpoint)
    handler = load_handler(options.handler)
    serving = given(options, SERVE_OPTIONS)
    serving["first_bytes"] = options.first_bytes or None
    if options.proxy is not None:
        serving["proxy"] = _proxy(endpoint, options)
    if admission := given(options, ADMISSION_OPTIONS):
        serving["admission"] = _admission(endpoint, admission)
    for name in ("proxy_optional", "proxy_timeout"):
        if options.proxy is None and getattr(options, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} needs --proxy", MISUSED)
    if "pending" in serving and "busy" not in serving:
        text = "--pending needs --busy, which says what clients beyond it get"
        raise CommandError(f"cannot serve {endpoint}: {text}", MISUSED)
    if "busy" in serving and "pending" not in serving and "admission" not in serving:
        text = "--busy needs --pending, which says how many wait before others are told: 0 for nobody"
        raise CommandError(f"cannot serve {endpoint}: {text}", MISUSED)
    if options.tls_cert is not None:
        from fastlisten.cli.tls import tls_context  # not at the top: ssl is much to import

        serving["ssl"] = tls_context(options)
    for name in ("tls_key", "tls_ca", "handshake_timeout"):
        if options.tls_cert is None and getattr(options, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} needs --tls-cert", MISUSED)
    status_endpoint(options)
    try:
        serve_options(handler, **serving)  # what is wrong with them is told before a socket opens
    except (TypeError, ValueError) as error:
        raise CommandError(f"cannot serve {endpoint}: {as_option(error)}", MISUSED) from error
    if options.workers is not None:
        from fastlisten.cli.workers import serve_with_workers  # only for who asks for them

        return serve_with_workers(endpoint, handler, serving, options)
    if options.ready_timeout is not None:
        raise CommandError("--ready-timeout needs --workers", MISUSED)
    with binding(endpoint):
        listener = passed_connection(endpoint) or fastlisten.bind(endpoint, **given(options, BIND_OPTIONS))
    with listener, notifier() as manager:
        if isinstance(listener, Listener):
            listener._close_when_emptied()
            with status_thread(options, listener) as status:
                return _serve(listener, handler, serving, options, manager, status)
        for name in given(options, (*BIND_OPTIONS, "proxy", *ADMISSION_OPTIONS, *STATUS_OPTIONS)):
            text = f"--{name.replace('_', '-')} is for listening, and {endpoint} is a client's connection"
            raise CommandError(text, MISUSED)
        ready(manager, "serving one client")
        return _serve_client(listener, handler, serving)


def _proxy(endpoint: Endpoint, options: argparse.Namespace) -> Proxy:
    from fastlisten import Proxy  # not at the top: for who asks for it

    timeout = {} if options.proxy_timeout is None else {"timeout": options.proxy_timeout}
    try:
        return Proxy(options.proxy, required=not options.proxy_optional, **timeout)
    except ValueError as error:
        text = as_option(error, trusted="proxy", timeout="proxy_timeout")
        raise CommandError(f"cannot serve {endpoint}: {text}", MISUSED) from error


def _admission(endpoint: Endpoint, given: dict[str, Any]) -> Admission:
    from fastlisten import Admission  # not at the top: for who asks for it

    try:
        return Admission(**given)
    except ValueError as error:
        raise CommandError(f"cannot serve {endpoint}: {as_option(error)}", MISUSED) from error


def _serve_client(
    client: socket.socket, handler: Callable[[Connection], object], serving: dict[str, Any]
) -> int:
    """Serve the one client that inetd (nowait) or systemd (Accept=yes) has accepted."""
    from fastlisten._inherited import serve_connection

    log.set_up()
    serve_connection(client, handler, serve_options(handler, **serving))
    return 0


def _serve(
    listener: Listener,
    handler: Callable[[Connection], object],
    serving: dict[str, Any],
    options: argparse.Namespace,
    manager: Notifier | None,
    status: StatusThread | None,
) -> int:
    report = Report(listener, options.json, Advice.on(options))
    signals = _drain_on_signals(listener, options, report, manager, status)
    if status is not None and options.status_control:
        from fastlisten.cli.control import ProcessControl  # only for who asks for it

        status.obey(ProcessControl(status, options.lame_duck, report))
    log.set_up(LogLines(report), listener=str(listener.endpoint))
    result, code, why = None, 0, None
    try:
        report.started(options.handler, None if status is None else status.endpoint)
        ready(manager, f"listening on {listener.endpoint}")
        with report:
            result = listener.serve(handler, watchdog=manager, **serving)
    except KeyboardInterrupt:
        code, why = INTERRUPTED, "SIGINT"
        stopping(manager)
    except OSError as error:
        raise CommandError(f"serving {listener.endpoint} failed: {error}", FAILED) from error
    report.stopped(why or (signals[-1] if signals else None), result)
    return code


def _drain_on_signals(
    listener: Listener,
    options: argparse.Namespace,
    report: Report,
    manager: Notifier | None,
    status: StatusThread | None,
) -> list[str]:
    """Let SIGTERM, SIGHUP and Ctrl-Break on Windows drain, after --lame-duck; the names that came are in the
    result.

    A SIGHUP that was ignored from the start is ignored still: nohup(1).
    """
    names: list[str] = []
    waits = [options.lame_duck] if status is not None and options.lame_duck else []

    def drain(name: str) -> None:
        seconds = 0 if names else options.drain  # the second time means now
        # told first: this may be another thread than the one that serves, and that ends
        report.draining(name, seconds)
        names.append(name)
        stopping(manager, f"draining for at most {seconds:g} s")
        listener.stop(drain=seconds)

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if status is not None and waits:
            seconds = waits.pop()
            status.leave(seconds, lambda: drain(name))
            report.leaving(name, seconds)
            return
        if status is not None:
            status.stay()
        drain(name)

    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and (name == "SIGTERM" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, stop)
    return names
