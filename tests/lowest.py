"""The least releases that pyproject.toml declares of what pcfast runs on, as constraints for pip (`make lowest`).

python tests/lowest.py
"""

from __future__ import annotations

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest() -> list[str]:
    lists = re.findall(
        r"^(?:dependencies|train) = \[(.*?)\]$", PYPROJECT.read_text(), re.DOTALL | re.MULTILINE
    )
    return [f"{name}=={release}" for name, release in re.findall(r'"([\w-]+)>=([\d.]+)"', "".join(lists))]


if __name__ == "__main__":
    print("\n".join(lowest()))
