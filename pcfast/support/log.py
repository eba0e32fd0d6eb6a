"""What pcfast says through Python's logging, logger "pcfast"."""

from __future__ import annotations

import logging

_log = logging.getLogger("pcfast")
_said: set[str] = set()


def info_once(message: str) -> None:
    """Log ``message`` at INFO the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        _log.info(message)


def warn_once(message: str) -> None:
    """Log ``message`` at WARNING the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        _log.warning(message)
