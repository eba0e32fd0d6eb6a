"""One relaxation to run: its settings, checked, and its plan, shapes and counts known before any tensor work."""

from .._moved import names_of

__getattr__ = names_of(__name__, "types")
