"""Which code a record was made with: a digest of everything that decides how fast a step is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pcfast

#: Parts of pcfast/ that no training step runs through.
NOT_TIMED = (
    "bench", "checking", "cli", "comparison", "datasets", "diagnostics", "kernels", "presets", "recipes", "training",
    "__main__.py", "_version.py", "explanation.py", "networks.py", "torch2pc.py",
)  # fmt: skip


def digest() -> str:
    """Of the sources of the package, its kernels and its native code, as they are installed here."""
    package = Path(pcfast.__file__).resolve().parent
    files = [file for file in package.rglob("*.py") if file.relative_to(package).parts[0] not in NOT_TIMED]
    for folder in (package / "kernels", package.parent / "kernels", package.parent / "csrc"):
        files += [f for f in folder.rglob("*") if f.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")]
    result = hashlib.sha256()
    for file in sorted(files, key=lambda f: (f.name, str(f))):
        result.update(file.name.encode() + b"\0" + file.read_bytes())
    return result.hexdigest()[:16]
