from collections.abc import Sequence
from typing import Any, Self, final

from fastlisten._core.admitting import Admitting

@final
class FirstBytes:
    def __new__(
        cls,
        seconds: float | None,
        timeout: float | None = None,
        networks: Sequence[tuple[int, bytes, int]] = (),
        required: bool = False,
        admitting: Admitting | None = None,
    ) -> Self: ...

def first_bytes_of(options: Any) -> FirstBytes | None: ...
