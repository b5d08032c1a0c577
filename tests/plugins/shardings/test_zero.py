"""What ZeRO's settings allow, said before any process starts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from loomtune.catalogue import installed
from loomtune.contracts import Sharding
from loomtune.errors import UserError
from loomtune.world import World
from loomtune_plugins.shardings import zero
from loomtune_plugins.shardings.settings import ZeroSettings
from loomtune_plugins.shardings.zero_config import configuration


def sharding(**settings: Any) -> Sharding:
    built: Sharding = installed().build("sharding", "zero", settings)
    return built


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_every_world_is_taken(stage: int, size: int) -> None:
    sharding(stage=stage).check(size)


def test_ranks_that_share_rows_must_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"(?s)6 processes cannot be divided.*set sharding\.sequence=3, "):
        sharding(sequence=4).check(6)
    cut = sharding(sequence=2)
    cut.check(6)
    assert [cut.replicas(World(rank, 6, rank, torch.device("cpu"))) for rank in (0, 1, 4)] == [(0, 3), (0, 3), (2, 3)]


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"stage": 0}, r"one step too many.*(?s:.*)set sharding\.stage to 1, 2 or 3, or sharding=ddp"),
        ({"stage": 4}, r"no stage 4(?s:.*)set sharding\.stage to 1, 2 or 3"),
        ({"offload": "disk"}, r"no offload 'disk'(?s:.*)none, optimizer, all"),
        ({"stage": 2, "offload": "all"}, r"stage 2 keeps whole(?s:.*)set sharding\.stage=3, or sharding\.offload="),
        ({"bucket_mb": 0}, r"set sharding\.bucket_mb to at least 1"),
        ({"persist": -5}, r"set sharding\.persist=0"),
        ({"persist": 5, "stage": 1}, r"no effect in stage 1(?s:.*)set sharding\.stage=3"),
        ({"nvme": "/disk"}, r"set sharding\.stage=3 sharding\.offload=optimizer"),
        ({"nvme": "/disk", "stage": 2, "offload": "optimizer"}, r"only stage 3(?s:.*)leave sharding\.nvme out"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(settings: dict[str, Any], cure: str) -> None:
    with pytest.raises(UserError, match=cure):
        sharding(**settings).check(2)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        sharding(stage=5, offload="disk").check(2)
    assert len(refused.value.faults) == 2


def test_a_disk_is_refused_where_libaio_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"nvme": "/disk", "offload": "optimizer"}
    monkeypatch.setattr(zero, "find_library", lambda name: None)
    with pytest.raises(UserError, match=r"needs libaio(?s:.*)libaio-dev"):
        sharding(**wanted).check(2)
    monkeypatch.setattr(zero, "find_library", lambda name: "libaio.so.1")
    sharding(**wanted).check(2)


def test_neither_torch_nor_deepspeed_is_imported_to_check() -> None:
    code = (
        "import sys; from loomtune_plugins.shardings.zero import Zero; from loomtune_plugins.shardings.settings import "
        "ZeroSettings; Zero(ZeroSettings()).check(2); sys.exit(bool({'torch', 'deepspeed'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_deepspeed_is_told_to_leave_clipping_and_torch_alone() -> None:
    told = configuration(ZeroSettings(stage=3, offload="all"), "bf16", "cuda")
    assert told["gradient_clipping"] == 0 and told["bf16"]["enabled"]
    assert not told["zero_optimization"]["memory_efficient_linear"]
    assert told["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_offload_to_a_disk_names_the_folder() -> None:
    told = configuration(ZeroSettings(offload="optimizer", nvme="/disk"), "fp32", "cpu")["zero_optimization"]
    assert told["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk", "pin_memory": False}
    assert "offload_param" not in told
