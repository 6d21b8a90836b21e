"""A clock for tests of time-dependent code."""


class Clock:
    """Seconds that pass only when the test advances them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
