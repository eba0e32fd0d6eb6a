"""The settings with which pcfast computes what other programs compute (docs/conventions.md), and `pcfast which`."""

from .identification import Match, identify
from .settings import (
    LOSSES,
    PRESETS,
    Preset,
    deepity,
    epc,
    epc_master,
    fabricpc,
    fabricpc_epc,
    jpc,
    jpc_mupc,
    pctrainer,
    pctrainer_ipc,
    pcx,
    pcx_ipc,
    preco,
    spc,
    torch2pc,
)

__all__ = [
    "LOSSES",
    "PRESETS",
    "Match",
    "Preset",
    "deepity",
    "epc",
    "epc_master",
    "fabricpc",
    "fabricpc_epc",
    "identify",
    "jpc",
    "jpc_mupc",
    "pctrainer",
    "pctrainer_ipc",
    "pcx",
    "pcx_ipc",
    "preco",
    "spc",
    "torch2pc",
]
