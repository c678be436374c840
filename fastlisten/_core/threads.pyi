from typing import Self, final

from typing_extensions import disjoint_base

from fastlisten._core.state import Taker

@final
class Worker: ...

@disjoint_base
class Dispatcher(Taker): ...

@final
class Lead:
    def __new__(cls, tick: int = 0) -> Self: ...

@final
class Threads:
    def __new__(
        cls, dispatcher: Dispatcher, least: int, most: int, daemon: bool, leave: bool, tick: int
    ) -> Self: ...
    def start_threads(self) -> None: ...
    def join(self) -> None: ...
    def work(self) -> None: ...
