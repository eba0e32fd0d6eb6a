"""The code that stands on a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path


def blocks_of_code(page: Path) -> list[str]:
    """Every python block, in the page's order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
