"""Weights by NCCL, with a stand-in for vLLM's half of the trainer that does what version 0.32's does."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from loomtune.errors import RunFailed, UserError
from loomtune_plugins.rollouts.vllm_nccl import NcclPush
from vllm_runs import PROMPTS, SAMPLING, alone, furthest, learn, policy, vllm
from vllm_server import Served, serving

KEYS = list(range(5))


@dataclass
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(kw_only=True)
class InitInfo:
    master_address: str
    master_port: int
    world_size: int
    rank: int


class Trainer:
    """As `NCCLTrainerWeightTransferEngine`: a broadcast that waits for ever, beside a request that says why."""

    def __init__(self, wires: list[queue.Queue[torch.Tensor]], init_info: InitInfo, client: Any, source: Any) -> None:
        self.wires, self.info, self.client, self.source = wires, init_info, client, source
        client.init_weight_transfer_engine(
            {
                "master_address": init_info.master_address,
                "master_port": init_info.master_port,
                "rank_offset": 1,
                "world_size": init_info.world_size,
                "packed": True,
            }
        )

    def send_weights(self) -> None:
        declared = self.source.metadata()
        info = {
            "names": [one.name for one in declared],
            "dtype_names": [str(one.dtype).split(".")[-1] for one in declared],
            "shapes": [list(one.shape) for one in declared],
        }
        self.client.start_weight_update()
        raised: list[BaseException] = []

        def update() -> None:
            try:
                self.client.update_weights(info)
            except BaseException as error:
                raised.append(error)

        request = threading.Thread(target=update, daemon=True)
        request.start()
        for one, (name, tensor) in zip(declared, self.source, strict=True):
            assert (one.name, one.dtype, one.shape) == (name, tensor.dtype, tuple(tensor.shape))
            for wire in self.wires:
                wire.put(tensor.clone())
        request.join()
        if raised:
            raise raised[0]
        self.client.finish_weight_update()


@pytest.fixture
def two(tied_model: Path) -> Iterator[tuple[Served, Served]]:
    with serving(tied_model, backend="nccl") as one, serving(tied_model, backend="nccl") as other:
        yield one, other


@pytest.fixture
def installed(two: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """vLLM, as far as a trainer sees it, and the trainers that it made."""
    made: list[Trainer] = []

    class Factory:
        @staticmethod
        def trainer_init(*, init_info: InitInfo, client: Any, source: Any) -> Trainer:
            made.append(Trainer([served.wire for served in two], init_info, client, source))
            return made[-1]

    transfer = "vllm.distributed.weight_transfer"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {},
        transfer: {"WeightTransferTrainerFactory": Factory},
        f"{transfer}.nccl_engine": {"NCCLTrainerInitInfo": InitInfo},
        f"{transfer}.base": {"ParamMeta": ParamMeta, "WeightSource": object},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(NcclPush, "check_device", lambda self, device: None)
    return made


def test_all_servers_get_the_weights_by_one_broadcast(two: tuple[Served, Served], installed: list[Trainer]) -> None:
    role, rollout = policy(two[0].path), vllm(two[0].url, two[1].url)
    for _ in range(2):
        assert furthest(role, PROMPTS, rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())) < 2e-5
        learn(role)
    (trainer,) = installed
    assert (trainer.info.world_size, trainer.info.rank) == (5, 0)
    infos = [served.asked["/init_weight_transfer_engine"][0]["init_info"] for served in two]
    assert [info["rank_offset"] for info in infos] == [1, 3] and {info["world_size"] for info in infos} == {5}
    assert [served.counts["/finish_weight_update"] for served in two] == [2, 2]
    assert not two[0].counts["/collective_rpc"]
    rollout.close()
    assert two[1].counts["/shutdown_weight_transfer_engine"] == 1


@pytest.mark.parametrize("endpoint", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"])
def test_a_server_that_says_no_ends_the_run_though_the_broadcast_hangs(
    two: tuple[Served, Served], installed: list[Trainer], endpoint: str
) -> None:
    two[1].behave = lambda asked, number: "500" if asked == endpoint else "well"
    with pytest.raises(RunFailed, match=rf"{endpoint}.*EngineCore encountered an issue"):
        rollout = vllm(two[0].url, two[1].url)
        rollout.generate(policy(two[0].path), PROMPTS, KEYS, SAMPLING, alone())


def test_a_server_that_takes_nothing_ends_the_run_in_time(two: tuple[Served, Served], installed: list[Trainer]) -> None:
    role, rollout = policy(two[0].path), vllm(two[0].url, two[1].url)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    learn(role)
    two[1].behave = lambda asked, number: "hang" if asked == "/update_weights" else "well"
    rollout._settings.patience = rollout._serving._push._patience = 2.0
    with pytest.raises(RunFailed, match=r"NCCL|/update_weights"):
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())


def test_without_vllm_beside_the_training_the_extra_is_named(
    two: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NcclPush, "check_device", lambda self, device: None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"loomtune\[vllm\]"):
        vllm(two[0].url).generate(policy(two[0].path), PROMPTS, KEYS, SAMPLING, alone())
