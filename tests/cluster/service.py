"""What a backend of the tests serves: its name, and the client's address as it has it."""

import os
import time

import fastlisten

NAME = os.environ.get("BACKEND", "")
PACE = os.environ.get("PACE", "")  # a file with the seconds that an answer takes


def handle(connection: fastlisten.Connection) -> None:
    """Answer one request of HTTP/1, and close."""
    request = b""
    while b"\r\n\r\n" not in request:
        if not (data := connection.recv(4096)):
            return
        request += data
    with open(PACE, encoding="ascii") as pace:
        time.sleep(float(pace.read()))
    body = f"{NAME} {connection.peer[0]}"
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    connection.sendall(f"{head}{body}".encode())
