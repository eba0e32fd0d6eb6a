"""Where a run's scalars go besides its own files: TensorBoard, Weights & Biases, CSV.

The first two are written by their libraries, which are optional; a writer opens at its first :meth:`write`.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

from ..errors import PcfastError
from ..support.files import write_csv, write_text

SCALARS = "scalars.csv"


class Csv:
    """scalars.csv: one line an epoch, in the run folder."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self._path, self._rows = folder / SCALARS, []
        if resumed and self._path.is_file():
            with open(self._path, newline="") as file:
                self._rows = [
                    {name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)
                ]

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self._rows = [row for row in self._rows if row["epoch"] < epoch]  # a killed run was further
        self._rows.append({"epoch": epoch, **values})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        rows = [[int(row["epoch"]), *(row.get(name, math.nan) for name in columns[1:])] for row in self._rows]
        write_csv(self._path, columns, rows)

    def close(self) -> None:
        """Every line is written."""


class TensorBoard:
    """tensorboard/N in the run folder, N = 1, 2, ...: a folder a run, which a resumed run goes on with."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        _require("tensorboard")
        self._folder, self._resumed, self._writer = folder / "tensorboard", resumed, None

    def write(self, epoch: int, values: dict[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            there = [int(path.name) for path in self._folder.glob("*") if path.name.isdecimal()]
            number = max(there, default=0) + (0 if self._resumed and there else 1)
            self._writer = SummaryWriter(str(self._folder / str(number)), purge_step=epoch)
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases; its name in the run folder lets a resumed run go on with it."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        _require("wandb")
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        try:
            wandb.login()  # asks for a key in a terminal: now, and not after an epoch
        except wandb.errors.Error as error:
            raise PcfastError(f"--log wandb: {error} WANDB_MODE=offline needs no login.") from error
        self._folder, self._resumed, self._run = folder, resumed, None

    def write(self, epoch: int, values: dict[str, float]) -> None:
        if self._run is None:
            import wandb

            kept = self._folder / "wandb-run"
            name = kept.read_text() if self._resumed and kept.is_file() else None
            settings = wandb.Settings(silent=True)
            self._run = wandb.init(
                dir=str(self._folder), project="pcfast", name=self._folder.name, id=name, resume="allow",
                settings=settings,
            )  # fmt: skip
            write_text(kept, self._run.id)
        self._run.log({"epoch": epoch, **values}, step=epoch)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb, "csv": Csv}


def _require(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ImportError(
            f'--log {library} needs {library}, which is not installed: pip install "pcfast[{library}]"'
        )
