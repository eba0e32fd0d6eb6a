"""How hypothesis draws examples here."""

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """Draw so many examples, the same in every run, however long each takes; a fixture's value serves them all."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
