from typing import Self, final

@final
class FirstBytes:
    def __new__(cls, seconds: float) -> Self: ...
