"""Files that are replaced whole: links, killed writers, full disks, and folders that one run at a time writes to."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pcfast.errors import ArgumentError, ArgumentTypeError
from pcfast.support import files
from pcfast.support.files import checked_folder, results_folder, write_atomically, write_csv, write_json

KILLED = (
    "import os, sys; from pcfast.support.files import write_atomically; "
    "write_atomically(sys.argv[1], lambda file: os.kill(os.getpid(), 9))"
)


def leave_a_leftover(path: Path) -> Path:
    before = set(path.parent.iterdir())
    subprocess.run([sys.executable, "-c", KILLED, path], cwd=Path(__file__).parent.parent)
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_a_link_of_a_foreseen_name_is_not_followed(tmp_path, monkeypatch):
    """Not even of the name that is drawn, and no lock is made through one."""
    other = tmp_path / "other"
    other.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    (tmp_path / f".a.json.{'0' * 16}.tmp").symlink_to(other)
    with pytest.raises(FileExistsError, match=r"a\.json"):
        write_json(tmp_path / "a.json", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "made by nobody")
    with pytest.raises(ArgumentError, match=r"^out: "), results_folder(tmp_path / "run"):
        pass
    assert other.read_text() == "precious" and not (tmp_path / "made by nobody").exists()


def test_leftovers_go_and_files_in_use_stay(tmp_path):
    target, mine = tmp_path / "a.json", tmp_path / ".notes.tmp"
    mine.write_text("")
    leave_a_leftover(target), leave_a_leftover(tmp_path / "b.json")
    (tmp_path / ".b.json.1234.tmp").write_text("of an earlier release")

    def write(file):
        (used,) = (p for p in tmp_path.glob(".c.csv.*.tmp"))
        with results_folder(tmp_path):
            assert used.exists() and len(list(tmp_path.glob(".*.tmp"))) == 2  # and the user's own
        file.write(b"content")

    write_json(target, 1)
    assert not list(tmp_path.glob(".a.json.*")) and len(list(tmp_path.glob(".b.json.*"))) == 2
    write_atomically(tmp_path / "c.csv", write)
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", "c.csv", mine.name}


@pytest.mark.parametrize("write", ["json", "csv", "torch", "png"])
def test_a_full_disk_names_the_file(tmp_path, write):
    """And leaves the old one; whatever the writer makes of the error."""
    calls = {
        "json": "from pcfast.support.files import write_json; write_json(path, list(range(10**5)))",
        "csv": "from pcfast.support.files import write_csv; write_csv(path, 'ab', [(1, 2)] * 10**5)",
        "torch": "import torch; from pcfast.support.files import write_atomically as w; "
        "w(path, lambda file: torch.save(torch.zeros(10**5), file))",
        "png": "from pcfast.training import curves; from pcfast.training.history import History as H; "
        "curves.training_curves(H(*[[1.0]] * 5), path)",
    }
    path = tmp_path / "result"
    path.write_text("old")
    code = f"import sys; path = sys.argv[1]; {calls[write]}"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=root, preexec_fn=limit
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("OSError: [Errno 27]") and str(path) in last
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["result"]


def test_what_takes_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none" / "x", Path("/proc/x")):
        with pytest.raises(OSError, match=str(path)):
            files.check_writable(path)
        with pytest.raises(OSError, match=str(path)):
            write_csv(path, "a", [])
    files.check_writable(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    """Threads, each through a descriptor of its own, take turns, though the lock file comes and goes."""
    inside, most, entered, stop = [], [], [], threading.Event()

    def run():
        while not stop.is_set():
            try:
                with results_folder(tmp_path / "a" / "b"):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(1)
                    inside.pop()
            except ArgumentError as error:
                assert "no other run" in str(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    threading.Event().wait(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(entered) > 20


def test_a_folder_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between two calls of mkdir another run ends: the parent is gone, or what mkdir found there is."""
    real, errors = (
        os.mkdir,
        [FileNotFoundError(2, "gone"), FileNotFoundError(2, "gone"), FileExistsError(17, "was")],
    )

    def interrupted(path, mode=0o777):
        if errors and str(path).endswith("b"):
            raise errors.pop()
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", interrupted)
    with results_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir() and not errors
    assert not (tmp_path / "a").exists()
    for path, reason in ((Path("/proc/none"), "No such file"), (tmp_path / "file" / "x", "Not a directory")):
        (tmp_path / "file").touch()
        with pytest.raises(ArgumentError, match=reason), results_folder(path):
            pass


def test_a_removed_lock_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking another run ends and removes the file: a lock on it would keep nobody out."""
    real, count = files._lock, []

    def late(descriptor):
        count.append(0)
        if len(count) == 1:
            (tmp_path / ".lock").unlink()
        return real(descriptor)

    monkeypatch.setattr(files, "_lock", late)
    with results_folder(tmp_path):
        assert len(count) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(ArgumentError, match="no other run"), results_folder(tmp_path):
            pass


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/below"])
def test_names_that_no_folder_has(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"^out: got "), results_folder(tmp_path / name):
        pass
    with pytest.raises(ArgumentTypeError, match=r"^out: got a int"):
        checked_folder("out", 3)
