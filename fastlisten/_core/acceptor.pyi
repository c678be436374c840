from collections.abc import Sequence
from typing import Self, final

from fastlisten._core.accept import Shortage
from fastlisten._core.first_bytes import FirstBytes
from fastlisten._core.state import State

@final
class Acceptor:
    def __new__(
        cls,
        listeners: Sequence[tuple[int, State]],
        nonblocking: bool,
        most: int,
        shortage: Shortage,
        first_bytes: FirstBytes | None = None,
    ) -> Self: ...
