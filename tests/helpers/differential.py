"""One random program on two transports, step by step: ours, and the event loop's own.

A Scenario says what a server's protocol does in each of its callbacks, and what its client does in between.
An Encounter plays it: client and event loop take turns, so that both transports find the same at each turn.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

Act = tuple[Any, ...]
Entry = tuple[Any, ...]

# What is sent and written, over and over: a piece in the wrong place shows.
PATTERN = bytes(range(251))
# More than any kernel's buffers and the mark above which a protocol has to pause.
HUGE = 900_000
SOCKET_BUFFER = 1 << 16
# So many turns of the loop without news, and it is idle: asyncio takes four to begin with a client.
QUIET = 12


class OnPurposeError(Exception):
    """What a callback raises."""


class Scenario(NamedTuple):
    """What happens in one connection.

    buffered: which kind of protocol comes first.  unix: over which kind of socket.  crowded: the loop has
    something else to do on each turn.  holds: our transport may hold back what is written, until the callback
    returns or the loop's next turn; it does not once somebody has the descriptor.  keep_open: what
    eof_received() returns.
    acts: for the name of a callback what is done in its first call, the second, ...  steps: what is done from
    outside.
    """

    buffered: bool
    unix: bool
    crowded: bool
    holds: bool
    keep_open: bool
    acts: dict[str, list[list[Act]]]
    steps: list[Act]


def piece(offset: int, length: int) -> bytes:
    """So many bytes of what is sent, from there on."""
    first = offset % len(PATTERN)
    return (PATTERN * ((first + length) // len(PATTERN) + 1))[first : first + length]


class Protocol(asyncio.BaseProtocol):
    """Notes its callbacks and does what the scenario has for each."""

    def __init__(self, encounter: "Encounter") -> None:
        self.encounter = encounter
        self.number = encounter.protocols
        encounter.protocols += 1

    def called(self, name: str, *about: Any) -> None:
        encounter = self.encounter
        encounter.log.append((self.number, name, *about))
        count = encounter.calls[name]
        encounter.calls[name] += 1
        encounter.resuming = name == "resume_writing"
        for act in encounter.scenario.acts.get(name, [])[count : count + 1]:
            encounter.act(act)
        encounter.resuming = False

    def connection_made(self, transport: Any) -> None:
        self.encounter.transport = transport
        if not self.encounter.scenario.holds:
            transport.get_extra_info("socket").fileno()
        self.encounter.making = True
        self.called("connection_made")
        self.encounter.making = False

    def received(self, data: bytes) -> None:
        self.encounter.received += data
        self.called("data", len(data))

    def eof_received(self) -> bool:
        self.called("eof_received")
        return self.encounter.scenario.keep_open

    def pause_writing(self) -> None:
        self.called("pause_writing")

    def resume_writing(self) -> None:
        self.called("resume_writing")

    def connection_lost(self, error: BaseException | None) -> None:
        try:
            self.called("connection_lost", type(error).__name__)
        finally:
            self.encounter.over = True


class Plain(Protocol, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.received(data)


class Buffered(Protocol, asyncio.BufferedProtocol):
    def get_buffer(self, sizehint: int) -> bytearray:
        # uvloop reads once more, in the same turn, when a buffer is full
        # Not noted: ours is asked once more, before a read that finds nothing.
        self.space = bytearray(1 << 16 if self.encounter.uvloop else 1000)
        return self.space

    def buffer_updated(self, nbytes: int) -> None:
        self.received(bytes(self.space[:nbytes]))


class Encounter:
    """One playing of a scenario on a loop's server.

    log: the callbacks and what the acts in them gave.  received, answered: what the server and the client
    got.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, scenario: Scenario) -> None:
        self.loop = loop
        self.scenario = scenario
        self.transport: Any = None
        self.making = self.resuming = self.over = False
        self.cut = False  # nobody can tell how much of what was written the client got
        self.uvloop = not isinstance(loop, asyncio.BaseEventLoop)
        self.protocols = 0
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[Any, ...]] = []
        self.received = self.answered = b""
        self.written = self.sent = 0

    # --- what the server does

    def act(self, acts: list[Act]) -> None:
        for act in acts:
            if self.left_out(act):
                continue
            if act == ("raise",):
                self.log.append(act)
                raise OnPurposeError
            name, *args = act
            try:
                answer = getattr(self, name)(*args)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            self.log.append((*act, answer))

    def written_next(self, length: int) -> bytes:
        """What comes after all that was written; pause_writing() writes while a write is at work."""
        self.written += length
        return piece(self.written - length, length)

    def write(self, length: int, kind: Any = bytes) -> None:
        try:
            self.transport.write(kind(self.written_next(length)))
        except RuntimeError:  # after write_eof()
            self.written -= length
            raise

    def writelines(self, lengths: list[int]) -> None:
        try:
            self.transport.writelines([self.written_next(length) for length in lengths])
        except RuntimeError:
            self.written -= sum(lengths)
            raise

    def mistake(self) -> Any:
        with contextlib.suppress(TypeError):
            self.transport.write("text")
            return "no TypeError"

    def ask(self, name: str, *args: Any) -> Any:
        return getattr(self.transport, name)(*args)

    def size(self) -> Any:
        return self.transport.get_write_buffer_size() > 0

    def extra(self, name: str) -> Any:
        answer = self.transport.get_extra_info(name, "default")
        if name == "socket" and answer not in (None, "default"):
            return answer.fileno() >= 0, answer.family, answer.type
        names = {self.address: "the server's"}
        with contextlib.suppress(OSError):
            names[self.client_address] = "the client's"
        return names.get(answer, answer) if isinstance(answer, str | tuple) else answer

    def switch(self, buffered: bool) -> Any:
        self.transport.set_protocol((Buffered if buffered else Plain)(self))

    def protocol(self) -> Any:
        protocol = self.transport.get_protocol()
        return getattr(protocol, "number", None)

    def later(self, acts: list[Act]) -> None:
        def run() -> None:
            if not self.over:  # else asyncio's own transport raises AttributeError
                self.log.append(("at last",))
                self.act(acts)

        self.loop.call_soon(run)

    def left_out(self, act: Act) -> bool:
        """Whether it is known that the event loop's own transport does it in another way."""
        if act == ("ask", "resume_reading") and self.calls["eof_received"]:
            return True  # it tells of the end once more
        if self.resuming and act[0] == "later":
            return True  # it ends before that if resume_writing() closes it, and once more after it
        if act in (("raise",), ("ask", "abort")) and (self.uvloop or self.written >= HUGE):
            # How much has gone by then is not ours to know: libuv's, or how much the kernel takes, which
            # differs by some bytes with the sizes of the pieces.
            self.cut = True
        if self.written >= HUGE and self.resuming and act[:2] == ("ask", "set_write_buffer_limits"):
            return True  # whether it pauses again is how much is left, which is the kernel's to know, too
        joined = self.scenario.holds or self.uvloop
        if self.written >= HUGE and joined and self.calls["resume_writing"] and act == ("size",):
            # asyncio's own has 13,156 left of 10 + 900,000 + 900,000 bytes, of 900,010 + 900,000 none
            return True
        if self.written >= HUGE and act[0] in ("write", "writelines") and self.transport.is_closing():
            return True  # it goes out if anything is unsent still, which is the kernel's to know
        if not self.uvloop:
            return False
        return (
            act == ("mistake",)  # it looks for none while it is closing
            # It asks a descriptor that it has closed: ValueError.
            or (act == ("extra", "peername") and self.scenario.unix and self.transport.is_closing())
            # It reads before it calls what connection_made() has scheduled, and although that has paused it.
            or act[0] == "later"
            or (self.making and act == ("ask", "pause_reading"))
            # While it is closing it takes write_eof(), and then no write() of its last callbacks; closed it
            # raises RuntimeError.
            or (act in (("ask", "write_eof"), ("put", "write_eof")) and self.transport.is_closing())
            # Nor is resume_writing() heard that writes then, nor anybody once it is closed.
            or (act[0] in ("write", "writelines") and self.transport.is_closing())
            # When it is aborted it still has what it could not write.
            or (act == ("size",) and (self.cut or self.calls["connection_lost"] > 0))
        )

    # --- what the client does

    def tell(self, *news: Any) -> None:
        """The client has seen this."""
        if self.log[-1:] != [("client", *news)]:
            self.log.append(("client", *news))

    def send(self, length: int) -> None:
        try:
            self.sent += self.client.send(piece(self.sent, length))
        except OSError as error:
            self.tell(type(error).__name__)
            self.cut = self.cut or isinstance(error, ConnectionResetError)  # told here, and not by read()

    def read(self, most: int) -> None:
        while most > 0:
            try:
                data = self.client.recv(min(most, 1 << 20))
            except BlockingIOError:
                return
            except OSError as error:
                self.tell(type(error).__name__)
                self.cut = True
                return
            if not data:
                self.tell("end", None if self.cut else len(self.answered))
                return
            self.answered += data
            most -= len(data)

    def shut(self) -> None:
        try:
            self.client.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.tell(type(error).__name__)

    def leave(self) -> None:
        if self.client.fileno() >= 0:
            self.client.close()
            self.log.append(("left",))

    def reset(self) -> None:
        if not self.scenario.unix and self.client.fileno() >= 0:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.leave()

    def server(self, acts: list[Act]) -> None:
        """Something else of the program does this with the transport, in a turn of its own."""
        if self.transport is not None:
            self.later(acts)

    # --- turns

    def turn(self) -> None:
        """One turn of the loop, with nothing scheduled for it by us unless it is to be crowded."""
        if self.scenario.crowded:
            self.loop.call_soon(str)
        if self.uvloop:  # whose stop() is scheduled as a callback is
            self.bell[0].send(b"x")
        else:
            self.loop.stop()
        self.loop.run_forever()

    def answer_bell(self) -> None:
        self.bell[1].recv(100)
        self.loop.stop()

    def state(self) -> Any:
        size = 0 if self.transport is None else self.transport.get_write_buffer_size()
        return len(self.log), len(self.answered), len(self.received), size

    def settle(self) -> None:
        """Run the loop until it is idle."""
        quiet = turns = 0
        while quiet < QUIET:
            before = self.state()
            self.turn()
            quiet = quiet + 1 if self.state() == before else 0
            turns += 1
            assert turns < 5000, self.log[-10:]

    def drain(self) -> None:
        """Read all that comes."""
        before = -1
        while before != len(self.answered):
            before = len(self.answered)
            self.settle()
            self.read(1 << 30)

    def entrance(self) -> Callable[..., Any]:
        """What `create` is given: makes a protocol for a client."""
        return lambda: (Buffered if self.scenario.buffered else Plain)(self)

    def play(self, create: Callable[..., Any], path: str) -> "Encounter":
        """Play it on a server that `create` makes, and end it."""
        family = socket.AF_UNIX if self.scenario.unix else socket.AF_INET
        self.bell = socket.socketpair()
        self.loop.add_reader(self.bell[1], self.answer_bell)
        # asyncio sets TCP_NODELAY where it sees the protocol's number
        listener = socket.socket(family, proto=0 if self.scenario.unix else socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        listener.bind(path if self.scenario.unix else ("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.loop.set_exception_handler(self.report)

        server = self.loop.run_until_complete(create(self.entrance(), sock=listener))
        try:
            self.client = socket.socket(family)
            with self.client:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
                if not self.scenario.unix:  # or what it sends would wait for when ours acknowledges (RFC 896)
                    self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.client.connect(self.address)
                self.client_address = self.client.getsockname()
                self.client.setblocking(False)
                for name, *args in self.scenario.steps:
                    getattr(self, name)(*args)
                self.settle()
                if self.client.fileno() >= 0:
                    self.drain()
                    self.leave()
            self.settle()
            self.log.append(("aborted",))
            if self.transport is not None and not self.transport.is_closing():
                self.transport.abort()
            self.settle()
        finally:
            server.close()
            self.settle()
            self.loop.remove_reader(self.bell[1])
            for sock in self.bell:
                sock.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return self

    def report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.log.append(("report", context["message"], type(context.get("exception")).__name__))

    def check(self) -> None:
        """Assert what holds for ours whatever the scenario."""
        assert self.received == piece(0, len(self.received))
        assert self.answered == piece(0, len(self.answered))
        assert len(self.received) <= self.sent
        assert not any(
            entry[0] == "report" and entry[2] in ("AttributeError", "OSError") for entry in self.log
        )
        assert len(self.answered) <= self.written
        calls = [entry[1] for entry in self.log if isinstance(entry[0], int)]
        assert calls[0] == "connection_made"
        assert calls[-1] == "connection_lost"
        for once in ("connection_made", "eof_received", "connection_lost"):
            assert calls.count(once) <= 1
        flow = [name for name in calls if name.endswith("_writing")]
        assert flow[::2] == ["pause_writing"] * len(flow[::2])
        assert flow[1::2] == ["resume_writing"] * len(flow[1::2])


class StreamEncounter(Encounter):
    """The same with a task and streams in place of a protocol: what it does are the acts of "task"."""

    attribute_missing = False

    def entrance(self) -> Callable[..., Any]:
        return self.arrive

    async def arrive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.transport = reader, writer, writer.transport
        if not self.scenario.holds:
            self.transport.get_extra_info("socket").fileno()
        for name in ("socket", "sockname"):  # who asks for the first time after the end gets None
            self.transport.get_extra_info(name)
        if self.uvloop:  # its own has read before a task takes its first step
            for _ in range(QUIET):
                await asyncio.sleep(0)
        try:
            for name, *args in self.scenario.acts["task"][0]:
                if name == "raise":
                    raise OnPurposeError
                if self.left_out((name, *args)):
                    continue
                try:
                    answer = getattr(self, name)(*args)
                    if asyncio.iscoroutine(answer):
                        answer = await answer
                except (
                    OSError,
                    asyncio.IncompleteReadError,
                    asyncio.LimitOverrunError,
                    RuntimeError,
                ) as error:
                    answer = repr(error)
                except AttributeError:  # asyncio's own write() after connection_lost(); ours does nothing
                    answer, self.attribute_missing = None, True
                self.log.append((name, *args, answer))
        finally:
            self.log.append(("the task ends",))

    def check(self) -> None:
        assert not self.attribute_missing
        assert self.answered == piece(0, len(self.answered))
        assert self.log.count(("the task ends",)) == 1

    def get(self, name: str, *args: Any) -> Any:
        return getattr(self.reader, name)(*args)

    def put(self, name: str, *args: Any) -> Any:
        return getattr(self.writer, name)(*args)


# --- what remains different, and is written down in ASYNCIO.md -------------------------------------------


def known(encounter: Encounter, entry: Entry) -> Entry | None:
    """What of an entry is compared; None for nothing of it."""
    if entry[0] == "report":
        if entry[2] in ("AttributeError", "OSError"):  # asyncio's ends twice if resume_writing() ends it
            return None
        own_words = "connection_lost" in entry[1] or entry[1].startswith("Exception in callback")
        return ("report", entry[2]) if own_words or encounter.uvloop else entry
    if encounter.scenario.holds and entry == ("client", "BrokenPipeError"):
        entry = ("client", "ConnectionResetError")  # the same reset, after the end of the stream: see below
    if encounter.uvloop and encounter.cut and encounter.written >= HUGE and entry[0] == "client":
        # After write_eof() and abort(): whether libuv had the end still to send is how much the kernel took.
        return None if entry[1] in ("end", "ConnectionResetError") else entry
    if (encounter.scenario.holds or encounter.uvloop) and entry[0] == "client" and encounter.cut:
        # Ours ends the stream with the last of it; without that a close resets who has sent what nobody read.
        # libuv still has unsent what ours has given to the kernel.
        return {"end": ("client", "end"), "ConnectionResetError": None}.get(entry[1], entry)
    if encounter.uvloop and entry[:2] in (
        ("ask", "is_reading"),  # its own is not yet in connection_made(), nor after eof_received()
        ("ask", "get_write_buffer_limits"),  # the lower is 16 bytes, where 16 KiB was meant
    ):
        return None
    if encounter.uvloop and entry[0] == "writelines" and entry[2] is not None:
        return (*entry[:2], entry[2].replace("writelines()", "write()"))  # as before Python 3.12
    return entry


def seen(encounter: Encounter) -> list[Any]:
    """What is compared: all of it but for what is known to be different."""
    log = encounter.log
    rest = [encounter.received]
    if not encounter.cut:
        rest.append(encounter.answered)
    # A write fails when it leaves: at the end of a callback what was held there, when the loop is idle on
    # uvloop.  Of several to a client that has gone the second fails, if they do not leave in one.  And we
    # read at once, asyncio in the turn in which the rest of a big write fails.
    if encounter.uvloop or encounter.scenario.holds or encounter.written >= HUGE:
        log, rest = log[: log.index(("left",))], []
    return [entry for entry in (known(encounter, entry) for entry in log) if entry is not None] + rest
