from typing import Self, final

@final
class Lead:
    def __new__(cls, tick: int = 0) -> Self: ...
