from collections.abc import Sequence
from typing import Any, Self, final

@final
class FirstBytes:
    def __new__(
        cls,
        seconds: float | None,
        timeout: float | None = None,
        networks: Sequence[tuple[int, bytes, int]] = (),
        required: bool = False,
    ) -> Self: ...

def first_bytes_of(options: Any) -> FirstBytes | None: ...
