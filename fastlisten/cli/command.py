"""The command from its arguments to its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastlisten.cli import log, output
from fastlisten.cli.arguments import parser
from fastlisten.cli.errors import INTERRUPTED, MISUSED, CommandError
from fastlisten.cli.hosts import hosts_command
from fastlisten.cli.run import run_command, split
from fastlisten.cli.serve import serve_command


def _workers_command(options: argparse.Namespace) -> int:
    from fastlisten.cli.workers import workers_command  # only for who asks for them

    return workers_command(options)


def _top_command(options: argparse.Namespace) -> int:
    from fastlisten.cli.top import top_command  # only for who asks for it

    return top_command(options)


COMMANDS = {
    "serve": serve_command,
    "hosts": hosts_command,
    "run": run_command,
    "workers": _workers_command,
    "top": _top_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 failed, 2 misused, 130 Ctrl-C."""
    output.open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # odd paths
    try:
        own, program = split(list(sys.argv[1:] if arguments is None else arguments))
        if not own:
            print(parser().format_help(), end="", file=sys.stderr)
            return MISUSED
        options = parser().parse_args(own)
        options.arguments = program
        if getattr(options, "log_format", None) == "json":
            log.use("json")
            options.json = True
        return COMMANDS[options.command](options)
    except CommandError as error:
        log.complain(" ".join(str(error).split()))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # told already
            output.discard()
