from collections.abc import Sequence
from typing import Self, final

from fastlisten._core.accept import Shortage
from fastlisten._core.state import State

__pyx_capi__: dict[str, object]

@final
class Acceptor:
    def __new__(
        cls, listeners: Sequence[tuple[int, State]], timeout: float, most: int, shortage: Shortage
    ) -> Self: ...
