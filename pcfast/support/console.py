"""Consoles for what a person reads: text as it is, and no end of the program where it cannot be written."""

from __future__ import annotations

from rich.console import Console


class PlainConsole(Console):
    """Prints text as it is: brackets, colons and numbers in it are neither markup nor highlighted."""

    def __init__(self, **options) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError; rich would end the process."""
        raise  # what rich handles as it calls this
