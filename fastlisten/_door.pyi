from collections.abc import Callable
from typing import Self, final

from fastlisten._connection import Connection
from fastlisten._listener import Listener, ServeOptions

__pyx_capi__: dict[str, object]

@final
class Door:
    def __new__(
        cls,
        listeners: tuple[Listener, ...],
        handler: Callable[[Connection], object] | None,
        options: ServeOptions,
    ) -> Self: ...
    def usher(self) -> None: ...
