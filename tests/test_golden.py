"""reference and eager against recorded float64 outputs of the published Torch2PC program."""

import golden
import pytest


def test_all_golden_vectors_are_here():
    assert len(golden.FILES) == 23


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_matches_torch2pc(path, backend):
    golden.assert_matches(path, backend)
