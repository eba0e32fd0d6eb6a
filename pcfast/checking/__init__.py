"""``pcfast check``: every backend against the float64 reference, within bounds."""

from .._moved import names_of
from .checker import check
from .report import Refusal, Report, Row

__all__ = ["Refusal", "Report", "Row", "check"]

__getattr__ = names_of(__name__, "checker", "copies", "report")
