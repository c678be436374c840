"""What ends the command: its exit statuses, and the error that becomes its last line."""

FAILED, MISUSED, INTERRUPTED = 1, 2, 130  # exit statuses; 130 is the shells' 128 + SIGINT


class CommandError(Exception):
    """What ends the command: one line for stderr and the exit status."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.status = status
