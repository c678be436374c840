from typing import final

from fastlisten._core.admission import Table

@final
class Admitting:
    def __new__(cls, table: Table, busy: bytes | None = None) -> Admitting: ...
