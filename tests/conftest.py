"""What holds in every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_torch():
    """A fixed seed, and NaN in all uninitialised memory, so that reading any of it shows."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
