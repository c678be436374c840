"""What a status port is asked."""

from typing import Any

from helpers.sockets import connect, read_all


def ask(address: Any, request: bytes) -> bytes:
    """Send a request and return all of the answer."""
    with connect(address) as client:
        client.sendall(request)
        return read_all(client)


def agent(address: Any) -> str:
    """Ask as HAProxy's agent-check does; return the line."""
    return ask(address, b"agent\n").decode()


class Answer:
    """An HTTP answer."""

    def __init__(self, text: bytes) -> None:
        head, _, body = text.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.fields = dict(line.split(": ", 1) for line in lines)
        self.text = body.decode()


def post(address: Any, target: str) -> tuple[int, str]:
    """Have a service do something; return the answer's status and text."""
    found = get(address, target, "X-Fastlisten-Control: 1", method="POST")
    return found.status, found.text.rstrip("\n")


def get(address: Any, path: str, *fields: str, method: str = "GET") -> Answer:
    """Ask by HTTP."""
    head = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: status", *fields, "", ""))
    return Answer(ask(address, head.encode()))
