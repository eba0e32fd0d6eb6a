"""The version of pcfast; the packaging metadata is read from here."""

__version__ = "0.1.0"
