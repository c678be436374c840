"""Sends requests, one a connection, and prints what became of them: load.py HOST PORT AT_ONCE PATH.

Each line is the JSON of all that were answered and failed until then.  Ends when its input does.
"""

import json
import socket
import sys
import threading
import time
from collections import Counter

REPORT = 0.02  # seconds between two lines


class Load:
    def __init__(self, host: str, port: int, path: str) -> None:
        self.target = (host, port)
        self.request = f"GET {path} HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n".encode()
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.answered: Counter[str] = Counter()  # by the backend's name
        self.failed: list[str] = []
        self.spent: Counter[str] = Counter()  # seconds

    def ask(self) -> str:
        """Send a request and return the answer's body; raises OSError and ValueError."""
        with socket.create_connection(self.target, 20) as client:
            own = client.getsockname()[0]
            client.sendall(self.request)
            parts = []
            while part := client.recv(4096):
                parts.append(part)
        head, _, body = b"".join(parts).decode().partition("\r\n\r\n")
        if not head.startswith("HTTP/1.1 200 "):
            raise ValueError(head.partition("\r\n")[0] or "nothing")
        name, _, peer = body.partition(" ")
        if peer != own:
            raise ValueError(f"{name} takes {own} for {peer!r}")
        return name

    def work(self) -> None:
        while not self.over.is_set():
            begin = time.monotonic()
            try:
                name = self.ask()
            except (OSError, ValueError) as error:
                with self.lock:
                    self.failed.append(f"{error!r} after {time.monotonic() - begin:.3f} s")
            else:
                with self.lock:
                    self.answered[name] += 1
                    self.spent[name] += time.monotonic() - begin  # type: ignore[assignment]

    def line(self) -> str:
        with self.lock:
            return json.dumps({"answered": self.answered, "spent": self.spent, "failed": self.failed})


def main() -> None:
    host, port, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    load = Load(host, port, sys.argv[4])

    def end() -> None:
        sys.stdin.read()
        load.over.set()

    threads = [threading.Thread(target=load.work) for _ in range(at_once)]
    threads.append(threading.Thread(target=end))
    for thread in threads:
        thread.start()
    while not load.over.wait(REPORT):
        print(load.line(), flush=True)
    for thread in threads:
        thread.join()
    print(load.line(), flush=True)


if __name__ == "__main__":
    main()
