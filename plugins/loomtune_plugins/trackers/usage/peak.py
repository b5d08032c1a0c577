"""How many operations a second an accelerator can do at best, where that is known."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from loomtune.run import Run

SHIPPED = {
    r"\bB200": "b200_180gb",
    r"H200(?! NVL)": "h200_141gb",
    r"H100 PCIe": "h100_pcie",
    r"H100 80GB HBM3": "h100_80gb",
    r"A100.*80GB": "a100_80gb",
    r"A100.*40GB": "a100_40gb",
    r"L40S": "l40s_48gb",
    r"MI300X": "mi300x_192gb",
    r"RTX 4090$": "rtx_4090",
}
"""How accelerators call themselves (`torch.cuda.get_device_name`), as patterns, to the shipped hardware data."""


def peak(run: Run) -> float | None:
    """Dense operations a second of one process' device in the run's precision; None where nobody says.

    From `hardware`, where that is what the run is on, else from what the device calls itself.
    """
    import torch

    device, hardware = run.world.device, run.settings.hardware
    known = hardware.tflops if hardware.known and (hardware.kind == "cpu") == (device.type == "cpu") else {}
    if not hardware.known and device.type == "cuda":
        known = shipped(torch.cuda.get_device_name(device))
    found = known.get(run.settings.precision)
    return found * 1e12 if found else None


def shipped(name: str) -> dict[str, float]:
    """TFLOP/s by precision of an accelerator by its own name; nothing where it is unknown."""
    config = next((config for pattern, config in SHIPPED.items() if re.search(pattern, name)), "")
    path = files("loomtune_conf") / "hardware" / f"{config}.yaml"
    return dict(yaml.safe_load(path.read_text()).get("tflops", {})) if config and path.is_file() else {}
