"""`fastlisten hosts`: what the system's resolver knows about a host."""

from __future__ import annotations

import argparse
import json
import socket

import fastlisten
from fastlisten.cli import output
from fastlisten.cli.errors import FAILED, CommandError

NO_NAME = (1, 4, 11001, 11004)  # HOST_NOT_FOUND and NO_DATA of <netdb.h>, and Winsock's for them


def hosts_command(options: argparse.Namespace) -> int:
    """Print a host entry and return the exit status, 0; raises CommandError."""
    name = fastlisten.get_host_name() if options.name is None else options.name
    try:
        entry = fastlisten.get_host_entry(name)
    except (OSError, TypeError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, socket.herror) and error.errno in NO_NAME:
            text = "no name is known for this address"
        raise CommandError(f"cannot look up {name!r}: {text}", FAILED) from error
    output.write_or_fail(_as_json(entry) if options.json else _as_rows(entry))
    return 0


def _as_json(entry: fastlisten.HostEntry) -> str:
    values = {
        "name": entry.name,
        "aliases": entry.aliases,
        "addresses": [str(address) for address in entry.addresses],
    }
    return json.dumps(values) + "\n"


def _as_rows(entry: fastlisten.HostEntry) -> str:
    rows = [("name", entry.name)]
    rows += [("alias", alias) for alias in entry.aliases]
    rows += [("address", str(address)) for address in entry.addresses]
    return "".join(f"{label:8}{value}\n" for label, value in rows)
