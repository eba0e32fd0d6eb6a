"""Benchmarks: ``pcfast bench``. Installed as pcfast.bench; results/ holds recorded runs."""
