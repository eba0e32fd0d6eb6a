"""The kernels' tests: triton interprets them on the CPU, in a process of their own (``make test``).

Triton reads TRITON_INTERPRET when it is imported, and every test here needs it.
"""

import os

import pytest

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if _INTERPRETED else ["test_*.py"]


def pytest_report_header():
    return (
        [] if _INTERPRETED else ["tests/kernels: not collected; make test runs them with TRITON_INTERPRET=1"]
    )


@pytest.fixture(autouse=True, scope="session")
def _repaired_interpreter():
    import interpreter

    interpreter.repair()


@pytest.fixture(autouse=True)
def _no_extents_left():
    yield
    import interpreter

    interpreter.clear_extents()


@pytest.fixture
def made(monkeypatch):
    """The designs that the backend makes."""
    from pcfast.backends.triton import designs

    result = []
    find = designs.design
    monkeypatch.setattr(designs, "design", lambda *a: result.append(find(*a)) or result[-1])
    return result


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that the streamed loop launched, with their keywords, in order."""
    from pcfast.backends.triton import loop

    seen = []
    names = (
        "launch_linear_predict", "launch_linear_feedback", "launch_mlp_relaxation", "launch_conv_predict",
        "launch_conv_feedback", "error_and_delta", "update", "gram_update", "output_error",
    )  # fmt: skip
    for name in names:
        run = getattr(loop, name)

        def record(*arguments, _name=name, _run=run, **keywords):
            seen.append((_name.removeprefix("launch_"), keywords))
            return _run(*arguments, **keywords)

        monkeypatch.setattr(loop, name, record)
    return seen
