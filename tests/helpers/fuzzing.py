"""Random tests: a fixed number of examples in the suite, for as long as `--fuzz SECONDS` says otherwise."""

import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

# So many examples, each time with another seed, before the clock is looked at.
ROUND = 200


class Fuzz:
    """Runs a test of hypothesis for `seconds`; 0 for its usual number of examples, always the same.

    count: how many examples the test has said that it ran.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.count = 0

    def machine(self, kind: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
        """Run a state machine; its examples are counted."""

        class Counted(kind):  # type: ignore[misc, valid-type]
            def __init__(machine) -> None:  # noqa: N805
                self.count += 1
                super().__init__()

        Counted.__name__ = kind.__name__
        self.run(lambda how: run_state_machine_as_test(Counted, settings=how), examples, steps)

    def run(self, test: Callable[[settings], None], examples: int, steps: int = 50) -> None:
        """Call `test` with the settings to use.

        examples: how many of them are enough in the suite.  steps: of each, if it is a state machine.
        """
        usual = settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        if not self.seconds:
            test(usual)
            return
        end = time.monotonic() + self.seconds
        phases = [Phase.generate, Phase.shrink]
        while time.monotonic() < end:
            test(settings(usual, max_examples=ROUND, derandomize=False, database=None, phases=phases))
