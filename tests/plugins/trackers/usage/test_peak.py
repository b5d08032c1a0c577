"""How much an accelerator can do, where that is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loomtune.settings import Hardware, Settings
from loomtune_plugins.trackers.usage.peak import SHIPPED, peak, shipped


def run(device: str, hardware: Hardware, precision: str = "bf16") -> Any:
    settings = Settings(hardware=hardware, precision=precision)
    return SimpleNamespace(world=SimpleNamespace(device=torch.device(device)), settings=settings)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_accelerators_are_known_by_what_they_call_themselves(name: str, tflops: float) -> None:
    assert shipped(name)["bf16"] == tflops


def test_every_pattern_has_its_figures() -> None:
    names = (
        "B200",
        "H200",
        "H100 PCIe",
        "H100 80GB HBM3",
        "A100-SXM4-80GB",
        "A100-PCIE-40GB",
        "L40S",
        "MI300X",
        "RTX 4090",
    )
    assert len(names) == len(SHIPPED) and all(shipped(f"Some {name}") for name in names)


@pytest.mark.parametrize("name", ["NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"])
def test_what_is_unknown_gets_no_number_of_another(name: str) -> None:
    assert shipped(name) == {}


def test_hardware_says_it_where_it_is_what_the_run_is_on() -> None:
    cpu = Hardware(kind="cpu", tflops={"fp32": 0.5})
    assert peak(run("cpu", cpu, "fp32")) == 0.5e12
    assert peak(run("cpu", cpu, "bf16")) is None
    assert peak(run("cpu", Hardware(kind="cuda", tflops={"bf16": 989}))) is None
    assert peak(run("cuda", Hardware(kind="cuda", tflops={"bf16": 989}))) == 989e12


def test_without_hardware_the_device_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak(run("cuda", Hardware())) == 989.4e12
    assert peak(run("cpu", Hardware())) is None
