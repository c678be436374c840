"""What many test files use; the modules that it does not name are imported by themselves."""

from helpers.addresses import LOOPBACK, NOBODYS, NOWHERE, own_loopback, reachable
from helpers.outcomes import Told, told
from helpers.probes import (
    PROBES,
    THOUSANDS,
    compiler,
    has_ipv6,
    knows_services,
    needs,
    not_under_wine,
    posix_only,
    tells_the_queue,
    under_wine,
)
from helpers.server_threads import Serving, echo, serving
from helpers.sockets import CLOSED, connect, exchange, nobody_listens, read_all, refusal, reset
from helpers.waiting import LIMIT, alarms, wait_until

__all__ = [
    "CLOSED",
    "LIMIT",
    "LOOPBACK",
    "NOBODYS",
    "NOWHERE",
    "PROBES",
    "THOUSANDS",
    "Serving",
    "Told",
    "alarms",
    "compiler",
    "connect",
    "echo",
    "exchange",
    "has_ipv6",
    "knows_services",
    "needs",
    "nobody_listens",
    "not_under_wine",
    "own_loopback",
    "posix_only",
    "reachable",
    "read_all",
    "refusal",
    "reset",
    "serving",
    "tells_the_queue",
    "told",
    "under_wine",
    "wait_until",
]
