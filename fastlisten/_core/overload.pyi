from typing import Self, final

from fastlisten._core.acceptor import Acceptor

HANDLERS_AT_MOST: int

@final
class Overload:
    def __new__(
        cls, acceptor: Acceptor, pending: int, handlers: int, most: int, busy: bytes
    ) -> Self: ...
    def refuse_over_pending(self) -> None: ...
