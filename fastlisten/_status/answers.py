"""What is answered: to HTTP, GET and HEAD of three paths, POST of others, and to HAProxy's agent-check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus

from fastlisten import metrics
from fastlisten._status.control import PATHS, Control, obey
from fastlisten._status.service import DRAINING, PAUSED, SERVING, STARTING, Service
from fastlisten._status.weight import Weight

# A request's head is not longer than this, in bytes.
LONGEST_REQUEST = 8192

# The first lines that tell an agent-check from HTTP: haproxy's `agent-send "agent\n"`, and that of one that
# wants no weight.
AGENT, AGENT_STATE = b"agent", b"state"

# "ready" ends what "drain" or "maint" began, which only the agent may: HAProxy's documentation, agent-check.
_AGENT_STATES = {STARTING: "down", PAUSED: "maint", DRAINING: "drain"}


def answer(request: bytes, service: Service, weight: Weight, control: Control | None = None) -> bytes | None:
    """The answer to what a client has sent so far; None: there is more to come.

    weight: of the service.  control: does what a POST asks; None: nothing is to be changed.
    """
    line, ended, _ = request.partition(b"\n")
    if ended and (asked := line.rstrip(b"\r")) in (AGENT, AGENT_STATE):
        return agent_line(service.state(), weight if asked == AGENT else None).encode()
    head, complete, _ = request.replace(b"\r\n", b"\n").partition(b"\n\n")
    if complete:
        return _http(head.decode("latin-1"), service, control)
    if len(request) > LONGEST_REQUEST:
        return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request is too long\n")
    return None


def agent_line(state: str, weight: Weight | None) -> str:
    """What an agent-check is told: HAProxy sets the server's state by the words, and its weight by the
    number, which is a percentage of the configured one.  weight: None gives no number."""
    if state != SERVING:
        return f"{_AGENT_STATES[state]}\n"
    if weight is None:
        return "up ready\n"
    return f"up {max(round(100 * weight.share()), 1)}% ready\n"  # 0 would be a drain


def _http(head: str, service: Service, control: Control | None) -> bytes:
    first, *lines = head.split("\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return _response(HTTPStatus.BAD_REQUEST, "the request is no HTTP/1\n")
    method, target, _ = words
    answers: dict[str, Callable[[], tuple[HTTPStatus, str, str]]] = {
        "/metrics": lambda: _metrics(lines, service),
        "/healthz": lambda: (HTTPStatus.OK, "alive\n", _PLAIN),
        "/readyz": lambda: _readyz(service),
    }
    if target.startswith("http://"):  # RFC 9112, section 3.2.2
        target = "/" + target.removeprefix("http://").partition("/")[2]
    path, _, query = target.partition("?")
    body = method != "HEAD"
    if control is not None and path in PATHS:
        if method == "POST":
            return _response(*obey(path, query, lines, control))
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, "only POST\n", more="Allow: POST\r\n", body=body)
    if method not in ("GET", "HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n", more="Allow: GET, HEAD\r\n")
    found = answers.get(path)
    if found is None:
        return _response(HTTPStatus.NOT_FOUND, f"there are {', '.join(answers)}\n", body=body)
    status, text, kind = found()
    return _response(status, text, kind, body=body)


def _readyz(service: Service) -> tuple[HTTPStatus, str, str]:
    state = service.state()
    ready = state == SERVING
    return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, f"{state}\n", _PLAIN


def _metrics(lines: Sequence[str], service: Service) -> tuple[HTTPStatus, str, str]:
    openmetrics = _prefers_openmetrics(lines)
    text = metrics.exposition(*service.sources(), openmetrics=openmetrics)
    kind = metrics.OPENMETRICS_CONTENT_TYPE if openmetrics else metrics.CONTENT_TYPE
    return HTTPStatus.OK, text, kind


def _prefers_openmetrics(lines: Sequence[str]) -> bool:
    """Whether the Accept fields say so; RFC 9110, section 12.5.1."""
    openmetrics, text = 0.0, 0.0
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() != "accept":
            continue
        for one in value.split(","):
            kind, *parameters = (part.strip().lower() for part in one.split(";"))
            weight = _weight(parameters)
            if kind == "application/openmetrics-text" and "version=0.0.1" not in parameters:
                openmetrics = max(openmetrics, weight)
            elif kind in ("text/plain", "text/*"):
                text = max(text, weight)
    return openmetrics > text


def _weight(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


_PLAIN = "text/plain; charset=utf-8"


def _response(status: HTTPStatus, text: str, kind: str = _PLAIN, more: str = "", body: bool = True) -> bytes:
    content = text.encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\nCache-Control: no-store\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode() + (content if body else b"")
