"""Package mapping of pcfast; everything else about the package stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    license="MIT",
    # The top-level folder kernels/ is installed as pcfast.kernels, never as a package `kernels`, which is
    # another project's name.
    package_dir={"pcfast": "pcfast", "pcfast.kernels": "kernels"},
    packages=[
        *find_packages(include=["pcfast", "pcfast.*"]),
        "pcfast.kernels",
        *(f"pcfast.kernels.{name}" for name in find_packages("kernels")),
    ],
)
