"""trio's serve_tcp."""

from __future__ import annotations

from functools import partial

import trio

from .handlers import ADDRESS, BACKLOG, HTTP_ANSWER, QUESTION_LIMIT


async def _answer(work: str, stream: trio.SocketStream) -> None:
    if work == "echo":
        await stream.send_all(await stream.receive_some(QUESTION_LIMIT))
    elif work == "http":
        question = b""
        while b"\r\n\r\n" not in question:
            more = await stream.receive_some(QUESTION_LIMIT)
            if not more:
                return
            question += bytes(more)
        await stream.send_all(HTTP_ANSWER)
    elif work == "hold":
        await stream.receive_some(1)


def serve_tcp(work: str) -> None:
    """A task a connection; trio closes the stream when the handler returns."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                partial(
                    trio.serve_tcp,
                    partial(_answer, work),
                    ADDRESS[1],
                    host=ADDRESS[0],
                    backlog=BACKLOG,
                )
            )
            print(listeners[0].socket.getsockname()[1], flush=True)

    trio.run(main)
