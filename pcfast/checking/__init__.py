"""``pcfast check``: every backend against the float64 reference, within bounds."""

from .checker import Refusal, Report, Row, check

__all__ = ["Refusal", "Report", "Row", "check"]
