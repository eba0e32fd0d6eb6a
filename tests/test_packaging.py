"""Installing pcfast: from a wheel, editable, and not at all; the folder kernels/ becomes pcfast.kernels."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from installing import ROOT, Installation, build_wheel, copy_sources, install, run_python
from lowest import lowest

import pcfast

# The CUDA kernels have tests of their own, tests/native/test_build.py.
WITHOUT_KERNELS = {"PCFAST_NATIVE": "0"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = copy_sources(tmp_path_factory.mktemp("wheel-source"))
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), WITHOUT_KERNELS)


@pytest.fixture(scope="module")
def from_wheel(wheel, tmp_path_factory) -> Installation:
    source = copy_sources(tmp_path_factory.mktemp("checkout"))
    return install(tmp_path_factory.mktemp("wheel-venv"), source, str(wheel))


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Installation:
    source = copy_sources(tmp_path_factory.mktemp("editable-checkout"))
    folder = tmp_path_factory.mktemp("editable-venv")
    return install(folder, source, "--editable", str(source), environment=WITHOUT_KERNELS)


WHERE = "import pcfast, pcfast.kernels; print(pcfast.__file__); print(pcfast.kernels.__file__)"


def test_the_wheel_holds_pcfast_and_its_kernels_and_nothing_else(wheel):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    metadata = f"pcfast-{pcfast.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"pcfast", metadata}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("pcfast/**/*.py")} | {
        f"pcfast/{path.relative_to(ROOT).as_posix()}"
        for folder in ("kernels", "bench")
        for path in ROOT.glob(f"{folder}/**/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert not [name for name in names if name.endswith(".so")] and "-py3-none-linux_" in wheel.name
    assert any(name.startswith(metadata) and name.endswith("LICENSE") for name in names)


def test_a_wheel_imports_outside_the_repository(from_wheel, tmp_path):
    package, kernels = from_wheel.output(WHERE, tmp_path)
    site = next(from_wheel.python.parent.parent.glob("lib/python*/site-packages"))
    assert Path(package) == site / "pcfast" / "__init__.py"
    assert Path(kernels) == site / "pcfast" / "kernels" / "__init__.py"


def test_a_wheel_imports_inside_the_repository(from_wheel):
    """Scripts and pytest there (-I) find the wheel; ``python -c`` finds the sources first, kernels included."""
    package, kernels = from_wheel.output(WHERE, from_wheel.source, "-I")
    assert not Path(package).is_relative_to(from_wheel.source)
    assert not Path(kernels).is_relative_to(from_wheel.source)
    package, kernels = from_wheel.output(WHERE, from_wheel.source)
    assert Path(package) == from_wheel.source / "pcfast" / "__init__.py"
    assert Path(kernels) == from_wheel.source / "kernels" / "__init__.py"


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_an_editable_install_imports_the_sources(editable, tmp_path, where):
    folder = tmp_path if where == "outside" else editable.source
    package, kernels = editable.output(WHERE, folder)
    assert Path(package) == editable.source / "pcfast" / "__init__.py"
    assert Path(kernels) == editable.source / "kernels" / "__init__.py"


def test_a_checkout_beside_an_editable_install_of_another_one_is_whole(editable, tmp_path):
    source = copy_sources(tmp_path)
    package, kernels = editable.output(WHERE, source)
    assert Path(package) == source / "pcfast" / "__init__.py"
    assert Path(kernels) == source / "kernels" / "__init__.py"


@pytest.mark.parametrize("kind", ["from_wheel", "editable"])
def test_no_top_level_kernels_and_one_version(kind, request, tmp_path):
    installation = request.getfixturevalue(kind)
    code = (
        "import importlib.metadata, importlib.util\n"
        "import pcfast\n"
        "print(importlib.util.find_spec('kernels'))\n"
        "print(pcfast.__version__, importlib.metadata.version('pcfast'))"
    )
    spec, versions = installation.output(code, tmp_path)
    assert spec == "None"
    assert versions == f"{pcfast.__version__} {pcfast.__version__}"


def test_the_import_needs_no_triton_imports_none_and_starts_no_process(from_wheel, tmp_path):
    """``sys.modules[name] = None`` makes importing it fail."""
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "started = []\n"
        "events = {'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.forkpty'}\n"
        "sys.addaudithook(lambda event, _: started.append(event) if event in events else None)\n"
        "import pcfast, pcfast.kernels\n"
        "assert not started, started\n"
        "assert not [name for name in sys.modules if name.startswith('triton.')]\n"
    )
    from_wheel.output(code, tmp_path)

    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    code = "import sys, pcfast, pcfast.kernels; assert 'triton' not in sys.modules"
    from_wheel.output(code, tmp_path)  # the working directory, with its triton, comes first


def test_an_uninstalled_checkout_names_the_remedy_in_one_line(tmp_path):
    """-S leaves site-packages out, torch included: the message comes before anything else can go wrong."""
    source = copy_sources(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(source)!r}); import pcfast"
    done = run_python(sys.executable, code, tmp_path, "-I", "-S")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "pip install -e ." in last
    assert "torch" not in last


def test_the_metadata_says_what_it_is(wheel):
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        result = email.message_from_bytes(archive.read(name))
    assert result["Author"] and result.get_all("Project-URL") and result["Requires-Python"] == ">=3.10"
    assert result["Description-Content-Type"] == "text/markdown"
    assert result.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    classifiers = result.get_all("Classifier")
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert sum(c.startswith("Programming Language :: Python :: 3.") for c in classifiers) >= 3


def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    """Every file of the checkout but caches, builds and what git alone needs; a part of the tests runs from it."""
    checkout = tmp_path / "checkout"
    no_sources = (".*", "__pycache__", "*.so", "*.pyc", "build", "runs", "*.egg-info", "dist")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*no_sources))
    there = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    environment = {**os.environ, **WITHOUT_KERNELS}

    def run(folder: Path, *command: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(checkout, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "made")
    (made,) = (tmp_path / "made").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert there <= held, there - held
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run(unpacked, "-m", "pytest", "-q", "tests/test_golden.py", "tests/test_readme.py")


def test_the_least_releases_are_those_declared():
    result = dict(line.split("==") for line in lowest())
    assert result.keys() == {"torch", "numpy", "click", "rich", "scikit-learn", "matplotlib"}
