"""What GPUs there are and how they fare: by nvidia-smi where it is, and by multiplying matrices."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import time
from typing import Any

import torch

SMI = "nvidia-smi"
PATIENCE = 15
"""Seconds for one question: nvidia-smi hangs where a GPU has fallen off its bus."""

ALWAYS = ("index", "name", "driver_version", "temperature.gpu", "memory.used")

SOMETIMES = (
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
"""Asked one by one: drivers refuse the whole question for one field that they do not know."""

SIDE = 4096
"""Of the matrices: 137 GFLOP a product, so that its launch does not count."""


def graphics(local_rank: int, seconds: float) -> dict[str, Any]:
    """A node's GPUs by its first rank, and the speed of each rank's own."""
    found: dict[str, Any] = {}
    if local_rank == 0:
        found = {"gpus": asked(), "xid": xid(), "peers": peers(), "count": torch.cuda.device_count()}
    if torch.cuda.is_available():
        found |= {"device": local_rank, "flops": flops(torch.device("cuda", local_rank), seconds)}
    return found


def asked() -> list[dict[str, str]] | None:
    """What nvidia-smi says of each GPU; None where there is no nvidia-smi."""
    if shutil.which(SMI) is None:
        return None
    rows = _query(ALWAYS)
    for field in SOMETIMES:
        for row, more in zip(rows, _query((field,)), strict=False):
            row.update(more)
    return rows


def _query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """A row for each GPU. Nothing where nvidia-smi does not know a field."""
    command = [SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if said.returncode:
        return []
    rows = csv.reader(said.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, (cell.strip() for cell in row), strict=False)) for row in rows if row]


def xid(log: str | None = None) -> list[str] | None:
    """The driver's own error reports in the kernel's log; None where this user may not read it."""
    if log is None:
        if shutil.which("dmesg") is None:
            return None
        said = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=PATIENCE, check=False)
        if said.returncode:
            return None
        log = said.stdout
    return re.findall(r"NVRM: (Xid .*)", log)[-5:]


def peers() -> list[list[int]]:
    """Pairs of the node's GPUs that cannot read each other's memory."""
    count = range(torch.cuda.device_count())
    both = [[one, other] for one in count for other in count if one < other]
    return [pair for pair in both if not torch.cuda.can_device_access_peer(*pair)]


def flops(device: torch.device, seconds: float) -> float:
    """Operations a second of products of bf16 matrices, for so many seconds."""
    one = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        one @ one  # the library chooses its kernel
    torch.cuda.synchronize(device)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            one @ one
        torch.cuda.synchronize(device)
        products += 10
    return products * 2 * SIDE**3 / (time.perf_counter() - began)
