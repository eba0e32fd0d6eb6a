"""Package mapping of pcfast; everything else about the package stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "bench")

setup(
    license="MIT",
    # The top-level folders kernels/ and bench/ are installed as pcfast.kernels and pcfast.bench, never as packages
    # `kernels` and `bench`, which are other projects' names.
    package_dir={"pcfast": "pcfast", **{f"pcfast.{folder}": folder for folder in FOLDERS}},
    packages=[
        *find_packages(include=["pcfast", "pcfast.*"]),
        *(f"pcfast.{folder}" for folder in FOLDERS),
        *(f"pcfast.{folder}.{name}" for folder in FOLDERS for name in find_packages(folder)),
    ],
    package_data={"pcfast.bench": ["*.sh"], "pcfast.bench.constants": ["*.cu", "*.cuh", "*.h"]},
)
