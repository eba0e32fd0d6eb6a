"""Finding pcfast.kernels and pcfast.bench where the package is imported from its source folder.

Installing maps the top-level folders kernels/ and bench/ into pcfast. A checkout on the module path has pcfast/
without them.
"""

from importlib.util import find_spec
from pathlib import Path


def find_folders(package_path: list[str]) -> None:
    """Make pcfast.kernels and pcfast.bench importable, or raise.

    Args:
        package_path: ``__path__`` of pcfast.

    Raises:
        ImportError: pcfast is not installed; the message is the remedy.
    """
    here = Path(__file__).resolve().parent
    checkout = here.parent
    result = find_spec("pcfast.kernels")
    # An editable install of another checkout answers too, with its own kernels.
    others = result and Path(result.origin).resolve().parent not in (here / "kernels", checkout / "kernels")
    if result and not (others and (checkout / "pyproject.toml").is_file()):
        return
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution("pcfast")
    except PackageNotFoundError:
        raise ImportError(
            "pcfast is not installed, only its source was found: run `pip install -e .` in its folder"
        ) from None
    # Installed, but this checkout comes first on the path (python -c in the repository): take its own.
    package_path.append(str(checkout))
