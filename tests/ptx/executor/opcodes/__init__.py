"""Emitters: one for each instruction, by kind. Importing this package registers them."""

from . import arithmetic, conversion, logic, matrices, memory, warp  # noqa: F401
