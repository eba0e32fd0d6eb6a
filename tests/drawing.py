"""How hypothesis draws examples here."""

import os

from hypothesis import HealthCheck, settings

#: How many times as many, of `make fuzz`.
FACTOR = int(os.environ.get("PCFAST_FUZZ_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """Draw so many examples, the same in every run, however long each takes; a fixture's value serves them all."""
    return settings(
        max_examples=FACTOR * count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
