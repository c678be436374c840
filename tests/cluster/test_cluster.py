"""Three backends behind HAProxy or nginx, each on a host of its own: what clients notice of what happens to
them."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import needs, probes, wait_until
from helpers.network import Network, has_networks, network
from helpers.programs import environment_of, plain_environment, run

pytestmark = [
    needs("Linux", "haproxy"),
    pytest.mark.skipif(not has_networks(), reason="needs network namespaces, and ip and nsenter for them"),
]

FOLDER = Path(__file__).parent
NAMES = ("one", "two", "three")
AT_ONCE = 12
FEW, MANY = 1500, 100_000  # requests
PACE = 0.01  # seconds that an answer takes, at least
LAME_DUCK = 2  # seconds, in which HAProxy is to see it also where it has a tenth of a processor

# Servers are looked at ten times a second, so that a test takes seconds. What HAProxy asks at the status
# port: /readyz, whether to send anybody; the agent, how many.
CONFIGURATION = """
global
    stats socket {folder}/haproxy.sock mode 600 level admin expose-fd listeners
defaults
    mode http
    timeout connect 1s
    timeout check 2s
    timeout client 20s
    timeout server 5s
    retries 3
    option redispatch 1
    default-server send-proxy-v2 weight 200
    default-server check inter 100ms fall 2 rise 1 port 9000
    default-server agent-check agent-port 9000 agent-inter 100ms
frontend clients
    bind {address}:8080
    use_backend weights if {{ path /weights }}
    default_backend service
backend service
    balance leastconn
    option httpchk GET /readyz
    default-server agent-send "state\\n" on-marked-down shutdown-sessions
{servers}
backend weights
    balance roundrobin
    option httpchk GET /readyz
    default-server agent-send "agent\\n"
{servers}
"""

# nginx looks at no status port: a connect that is refused tells it.
NGINX = """
{load}
daemon off;
user root;
pid {folder}/nginx.pid;
events {{ worker_connections 200; }}
stream {{
    upstream service {{
{servers}
    }}
    server {{
        listen {address}:8081;
        proxy_pass service;
        proxy_protocol on;
        proxy_connect_timeout 1s;
        proxy_timeout 20s;
        proxy_next_upstream on;
    }}
}}
"""


class Backend:
    """A host that serves, with two worker processes."""

    def __init__(self, network: Network, name: str, folder: Path) -> None:
        self._network, self.name = network, name
        self._pace = folder / f"{name}.pace"
        self.take(PACE)
        self.address = network.address(name)
        self._log = folder / f"{name}.log"

    def start(self) -> None:
        """Serve, and return when it is ready."""
        arguments = [
            *("serve", f"{self.address}:8000", "service:handle", "--workers", "2", "--threads", "1,32"),
            *("--proxy", self._network.hub_address(self.name), "--status", f"{self.address}:9000"),
            *("--lame-duck", str(LAME_DUCK), "--drain", "10", "--status-control"),
        ]
        command = self._network.hosts[self.name].command(sys.executable, "-m", "fastlisten", *arguments)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=FOLDER,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=plain_environment(BACKEND=self.name, PACE=str(self._pace)),
            )
        # HAProxy's own check is not asked for it: it knows late, and what the last one was
        wait_until(lambda: self.process.poll() is not None or self.told() == "serving", what=self.name)
        assert self.process.poll() is None, self._log.read_text()

    def take(self, seconds: float) -> None:
        """Have each answer take so long from now on."""
        new = self._pace.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._pace)

    def told(self, path: str = "/readyz") -> str:
        """What its status port tells the hub."""
        command = self._network.hub.command("curl", "-s", "-m", "1", f"http://{self.address}:9000{path}")
        return run(command, limit=20, status=None).stdout.strip()

    def paused(self) -> bool:
        """Whether all its workers are."""
        rows = [line for line in self.told("/metrics").splitlines() if line.startswith("fastlisten_paused{")]
        return bool(rows) and all(row.endswith(" 1") for row in rows)

    def have(self, target: str) -> None:
        """Have its status port do something."""
        url = f"http://{self.address}:9000{target}"
        self._network.hub.run("curl", "-fsS", "-m", "5", "-X", "POST", "-H", "X-Fastlisten-Control: 1", url)

    def replaced(self) -> int:
        """How often all workers have been replaced until now."""
        return self._log.read_text().count("2 of 2 workers are replaced")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once; nothing happens where it is not there."""
        self.process.kill()
        self.process.wait()

    def end(self, until: Callable[[], bool]) -> None:
        """End it as its supervisor does; the second signal comes when HAProxy has seen the first."""
        self.process.terminate()
        wait_until(until, what="nobody is sent there")
        self.process.terminate()
        assert self.process.wait(20) == 0, self._log.read_text()


class Cluster:
    """HAProxy on the hub, backends on their hosts, clients on theirs."""

    def __init__(self, network: Network, folder: Path, stack: contextlib.ExitStack) -> None:
        self.network, self._folder = network, folder
        self._stack = stack
        self.backends = {name: Backend(network, name, folder) for name in NAMES}
        for backend in self.backends.values():
            stack.callback(backend.kill)
            backend.start()
        self.host, self.port = network.hub_address("client"), "8080"
        servers = [f"    server {name} {it.address}:8000" for name, it in self.backends.items()]
        file = folder / "haproxy.cfg"
        file.write_text(CONFIGURATION.format(folder=folder, address=self.host, servers="\n".join(servers)))
        program = probes.haproxy()
        assert program is not None
        command = network.hub.command(program, "-W", "-db", "-f", str(file))
        environment = environment_of(command, None)
        self.haproxy = stack.enter_context(subprocess.Popen(command, env=environment))
        stack.callback(self.haproxy.terminate)
        wait_until(lambda: set(self.status().values()) == {"UP"}, what="HAProxy sees all backends")

    def control(self, command: str) -> str:
        """Say something to HAProxy, and return its answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self._folder / "haproxy.sock"))
            client.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def process(self) -> str:
        """Which process of HAProxy answers; "" while it is being replaced."""
        with contextlib.suppress(OSError):
            lines = self.control("show info").split("\n")
            return next((line for line in lines if line.startswith("Pid:")), "")
        return ""

    def rows(self, backend: str) -> dict[str, dict[str, str]]:
        try:
            head, *lines = self.control("show stat").strip().split("\n")
        except OSError:  # not yet there, or being replaced
            return {}
        names = head.removeprefix("# ").split(",")
        rows = (dict(zip(names, line.split(","), strict=False)) for line in lines)
        return {row["svname"]: row for row in rows if row["pxname"] == backend and row["svname"] in NAMES}

    def left(self, name: str) -> bool:
        """Whether HAProxy sends nobody to a backend, and all whom it sent have their answers."""
        row = self.rows("service").get(name, {})
        return bool(row) and not row["status"].startswith("UP") and row["scur"] == "0"

    def status(self, backend: str = "service") -> dict[str, str]:
        """What HAProxy thinks of each server of a backend of its own: UP, DOWN, DRAIN ..."""
        return {name: row["status"].split()[0] for name, row in self.rows(backend).items()}


class Nginx:
    """nginx beside HAProxy, as long as the block goes on."""

    port = "8081"

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self._folder = cluster, folder

    def __enter__(self) -> Nginx:
        found = probes.nginx_stream()
        assert found is not None
        program, self._load = found
        self._configure()
        files = ["-c", str(self._folder / "nginx.conf"), "-e", str(self._folder / "nginx.log")]
        command = self.cluster.network.hub.command(program, *files)
        self._process = subprocess.Popen(command, env=environment_of(command, None))
        wait_until((self._folder / "nginx.pid").exists)
        return self

    def _configure(self, down: str = "") -> None:
        servers = [
            f"        server {it.address}:8000 max_fails=1 fail_timeout=1s{' down' * (name == down)};"
            for name, it in self.cluster.backends.items()
        ]
        values = {"load": self._load, "folder": self._folder, "address": self.cluster.host}
        text = NGINX.format(**values, servers="\n".join(servers))
        (self._folder / "nginx.conf").write_text(text)

    def reload(self, down: str = "") -> None:
        """Have nobody sent to a backend any more, or all to be sent to; returns when it is so."""
        self._configure(down)
        before = self._workers()
        self._process.send_signal(signal.SIGHUP)
        wait_until(lambda: bool(now := self._workers()) and not now & before, what="nginx is reloaded")

    def _workers(self) -> set[str]:
        process = self._process.pid
        return set(Path(f"/proc/{process}/task/{process}/children").read_text().split())

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.terminate()


class Requests:
    """Requests that go on until the block ends.

    path: "/weights" has HAProxy go by the agents' weights alone.  port: another's than HAProxy's.  answered,
    spent: how many, and the seconds that they took, by the backend.  failed: why the others did.
    """

    def __init__(self, cluster: Cluster, at_once: int, path: str = "/", port: str = "") -> None:
        client = cluster.network.hosts["client"]
        target = [cluster.host, port or cluster.port]
        command = [sys.executable, str(FOLDER / "load.py"), *target, str(at_once), path]
        self._process = subprocess.Popen(
            client.command(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answered: dict[str, int] = {}
        self.spent: dict[str, float] = {}
        self.failed: list[str] = []
        self._reading = threading.Thread(target=self._read)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.answered, self.spent, self.failed = told["answered"], told["spent"], told["failed"]

    @property
    def count(self) -> int:
        return sum(self.answered.values())

    def go_on(self, number: int) -> None:
        """Wait until so many more are answered."""
        goal = self.count + number
        wait_until(lambda: self.count >= goal, 300 if number > FEW else 20, "answers go on")

    def go_on_for(self, seconds: float) -> None:
        """Wait for so long."""
        end = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() >= end)

    def __enter__(self) -> Requests:
        self._reading.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(30)
            self._reading.join()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network(*NAMES, "client"))
        cluster = Cluster(hosts, tmp_path_factory.mktemp("cluster"), stack)
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """Give the cluster with all backends up and none slow, and see that it is left so."""
    yield shared
    wait_until(lambda: set(shared.status().values()) == {"UP"}, what="all backends are up again")


# --- what is done to them


def replace_workers(_: Cluster, backend: Backend) -> None:
    """Have its workers replaced, one after the other; SIGHUP."""
    before = backend.replaced()
    backend.send(signal.SIGHUP)
    wait_until(lambda: backend.replaced() == before + 1, 20, "workers are replaced")


def start_anew(cluster: Cluster, backend: Backend) -> None:
    """End it as its supervisor does, and start it again."""
    backend.end(lambda: cluster.left(backend.name))
    backend.start()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
@pytest.mark.parametrize("restart", [replace_workers, start_anew])
def test_a_rolling_restart_fails_nobody(
    cluster: Cluster, restart: Callable[[Cluster, Backend], None], number: int
) -> None:
    with Requests(cluster, AT_ONCE) as requests:
        requests.go_on(number // 10)
        for backend in cluster.backends.values():
            restart(cluster, backend)
            requests.go_on(number // 4)
    assert requests.failed == []
    assert set(requests.answered) == set(NAMES)


def test_a_backend_that_is_killed_costs_what_it_had_in_hand(cluster: Cluster) -> None:
    with Requests(cluster, AT_ONCE) as requests:
        requests.go_on(100)
        victim = cluster.backends["two"]
        victim.kill()
        requests.go_on(FEW)
        failed = len(requests.failed)
        assert failed <= AT_ONCE, requests.failed
        assert cluster.status()["two"] == "DOWN"
        victim.start()
        served = requests.answered["two"]
        wait_until(lambda: requests.answered["two"] > served)
    assert len(requests.failed) == failed, requests.failed


def test_a_backend_that_is_cut_off_costs_what_it_had_in_hand(cluster: Cluster) -> None:
    with Requests(cluster, AT_ONCE) as requests:
        requests.go_on(100)
        cluster.network.cable("three", False)
        wait_until(lambda: cluster.status()["three"] == "DOWN")
        requests.go_on(FEW // 3)
        failed = len(requests.failed)
        assert failed <= AT_ONCE, requests.failed
        cluster.network.cable("three", True)
        served = requests.answered["three"]
        wait_until(lambda: requests.answered["three"] > served)
    assert len(requests.failed) == failed, requests.failed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", ["/", "/weights"])
@pytest.mark.parametrize(
    ("number", "within"), [(FEW // 2, 0.4), pytest.param(20_000, 0.1, marks=pytest.mark.soak)]
)
def test_a_slow_backend_gets_as_much_as_it_answers(
    cluster: Cluster, path: str, number: int, within: float
) -> None:
    """By `balance leastconn`, with which as many requests are with each, and by the agent's weight alone."""
    with Requests(cluster, AT_ONCE, path) as requests:
        if path == "/weights":
            requests.go_on_for(1.5)  # the agents learn how fast they are when all is well
        slow = cluster.backends["one"]
        slow.take(10 * PACE)
        requests.go_on_for(2)
        before, spent_before = dict(requests.answered), dict(requests.spent)
        requests.go_on(number)
        answered = {name: count - before[name] for name, count in requests.answered.items()}
        speed = {name: answered[name] / (requests.spent[name] - spent_before[name]) for name in NAMES}
        slow.take(PACE)
    assert requests.failed == []
    assert speed["one"] < speed["two"] / 4  # a tenth, on a machine that has nothing else to do
    share = answered["one"] / sum(answered.values())
    assert share == pytest.approx(speed["one"] / sum(speed.values()), rel=within)


def test_a_backend_is_taken_away_and_added_by_its_agent(cluster: Cluster) -> None:
    """A pause at its status port: nobody is sent there, nobody fails, and it gets clients again."""
    victim = cluster.backends["three"]
    with Requests(cluster, AT_ONCE, "/weights") as requests:
        requests.go_on(100)
        victim.have("/pause")
        try:
            wait_until(lambda: cluster.status("weights")["three"] == "MAINT")
            requests.go_on(4 * AT_ONCE)  # who was sent there before is answered
            wait_until(victim.paused)
            served = requests.answered["three"]
            requests.go_on(FEW // 3)
            assert (requests.answered["three"], requests.failed) == (served, [])
        finally:
            victim.have("/resume")
        wait_until(lambda: requests.answered["three"] > served)
    assert requests.failed == []


# --- nginx


@pytest.fixture
def nginx(cluster: Cluster, tmp_path: Path) -> Iterator[Nginx]:
    with Nginx(cluster, tmp_path) as nginx:
        yield nginx


def restart_behind_nginx(nginx: Nginx, backend: Backend) -> None:
    """Start it anew when nginx sends nobody there any more."""
    nginx.reload(down=backend.name)
    start_anew(nginx.cluster, backend)
    nginx.reload()


@needs("nginx with its stream module")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [FEW // 3, pytest.param(MANY, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("restart", "fails"),
    [
        (lambda nginx, backend: replace_workers(nginx.cluster, backend), False),
        (restart_behind_nginx, False),
        pytest.param(lambda nginx, backend: start_anew(nginx.cluster, backend), True, marks=pytest.mark.soak),
    ],
    ids=["workers", "told", "not told"],
)
def test_a_rolling_restart_behind_nginx(
    cluster: Cluster, nginx: Nginx, restart: Callable[[Nginx, Backend], None], fails: bool, number: int
) -> None:
    """nginx does not ask whether a backend is ready: who comes while it drains fails, if it is not told."""
    with Requests(cluster, AT_ONCE, port=nginx.port) as requests:
        requests.go_on(number // 10)
        for backend in cluster.backends.values():
            restart(nginx, backend)
            requests.go_on(number // 4)
    assert fails or requests.failed == []
    assert set(requests.answered) == set(NAMES)


@needs("nginx with its stream module")
def test_a_backend_that_is_killed_behind_nginx(cluster: Cluster, nginx: Nginx) -> None:
    """It costs what it had in hand: a connect that is refused goes to the next one."""
    with Requests(cluster, AT_ONCE, port=nginx.port) as requests:
        requests.go_on(100)
        victim = cluster.backends["two"]
        victim.kill()
        requests.go_on(FEW // 3)
        failed = len(requests.failed)
        assert failed <= AT_ONCE, requests.failed
        victim.start()
        served = requests.answered["two"]
        wait_until(lambda: requests.answered["two"] > served)
    assert len(requests.failed) == failed, requests.failed


def test_haproxy_is_reloaded(cluster: Cluster) -> None:
    with Requests(cluster, AT_ONCE) as requests:
        requests.go_on(100)
        before = cluster.process()
        cluster.haproxy.send_signal(signal.SIGUSR2)
        wait_until(lambda: cluster.process() not in ("", before))
        requests.go_on(FEW // 3)
    assert requests.failed == []
