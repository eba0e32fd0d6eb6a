"""One relaxation to run: its settings, checked, and its plan, shapes and counts known before any tensor work."""
