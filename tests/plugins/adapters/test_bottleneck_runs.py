"""Whole runs with bottleneck adapters: one curve in every layout, and one model wherever what was trained is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loomtune import api
from loomtune.errors import UserError
from loomtune.plan import Plan
from loomtune.session import opened
from loomtune_plugins.adapters.bottleneck.bottleneck import attach
from runs.curves import largest
from runs.worlds import Outcome, Worlds

LOSS, NORM = 5e-6, 1e-5
HOULSBY = ["adapter=bottleneck", "adapter.reduction=4", "adapter.dropout=0.1"]
PFEIFFER = ["adapter=bottleneck", "adapter.variant=pfeiffer", "adapter.size=6", "adapter.activation=silu"]
ADAPTERS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER}
RECOMPUTED = "sharding.activation_checkpointing=true"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 2, recomputed": (1, ["sharding=single", RECOMPUTED, "batch.micro=2"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp"]),
    "ddp on 2, recomputed": (2, ["sharding=ddp", RECOMPUTED]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp"]),
    "fsdp on 2, recomputed": (2, ["sharding=fsdp", RECOMPUTED, "batch.micro=2"]),
    "fsdp on 2, kept gathered": (2, ["sharding=fsdp", "sharding.reshard=false"]),
    "fsdp, sequence 2, recomputed": (2, ["sharding=fsdp", "sharding.sequence=2", RECOMPUTED]),
    "zero 2 on 2": (2, ["sharding=zero", "sharding.stage=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3"]),
    "zero 3 on 2, recomputed": (2, ["sharding=zero", "sharding.stage=3", RECOMPUTED]),
    "zero 3, sequence 2": (2, ["sharding=zero", "sharding.stage=3", "sharding.sequence=2"]),
}
EVERYDAY = ("houlsby", "fsdp on 2, recomputed")
CELLS = [
    pytest.param(variant, layout, marks=() if (variant, layout) == EVERYDAY else pytest.mark.slow)
    for variant in ADAPTERS
    for layout in LAYOUTS
]

Alone = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tiny(tied_model: Path, mixed_data: Path) -> list[str]:
    """Settings of a run of the tiny model; so quick a rate that adapters do much in few steps."""
    model = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}"]
    return [*model, "optimizer.lr=1e-2", "optimizer.clip=1.0", "tracker=[jsonl]", "checkpoint.background=false"]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The run on one process, made once for each set of settings."""
    made: dict[tuple[str, ...], Outcome] = {}

    def of(*settings: str) -> Outcome:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*tiny, *settings, "sharding=single"], folder)
        return made[settings]

    return of


def agree(one: Outcome, other: Outcome) -> None:
    loss, norm = (largest(one.series(name), other.series(name)) for name in ("loss", "grad_norm"))
    assert loss < LOSS and norm < NORM, f"relative differences: loss {loss:.1e}, gradient norm {norm:.1e}"
    assert one.series("loss")[-1] < 0.98 * one.series("loss")[0]


@contextmanager
def base_of(folder: Path) -> Iterator[torch.nn.Module]:
    """The trained model of a run's folder, as loomtune itself computes with it."""
    with opened(Plan.load(folder), folder) as run, run.policy.engine.gathered() as module:
        yield module


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=torch.arange(24).reshape(2, 12), use_cache=False).logits
        return found


def adapter_of(outcome: Outcome) -> Path:
    (folder,) = (outcome.folder / "checkpoints").glob("step-*/adapter")
    return folder


@pytest.mark.parametrize(("variant", "layout"), CELLS)
def test_every_layout_gives_the_curve_of_one_process(
    variant: str, layout: str, worlds: Worlds, tiny: list[str], alone: Alone, tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    settings = [*ADAPTERS[variant], "steps=12"]
    agree(worlds.train(size, [*tiny, *settings, *how], tmp_path / "run"), alone(*settings))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ADAPTERS)
@pytest.mark.parametrize("how", ["sharding=ddp", "sharding=fsdp", "sharding=zero sharding.stage=3"])
def test_bf16_stays_near_bf16_on_one_process(
    variant: str, how: str, worlds: Worlds, tiny: list[str], alone: Alone, tmp_path: Path
) -> None:
    settings = [*ADAPTERS[variant], "steps=12", "precision=bf16"]
    found = worlds.train(2, [*tiny, *settings, *how.split()], tmp_path / "run")
    assert largest(found.series("loss"), alone(*settings).series("loss")) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ADAPTERS)
def test_a_run_goes_on_under_another_layout(
    variant: str, worlds: Worlds, tiny: list[str], alone: Alone, tmp_path: Path
) -> None:
    settings = [*ADAPTERS[variant], "steps=12"]
    worlds.train(2, [*tiny, *settings, "sharding=fsdp", "stop_after=4"], tmp_path / "run")
    worlds.resume(2, tmp_path / "run", "sharding=zero", "sharding.stage=3", "stop_after=8")
    agree(worlds.resume(1, tmp_path / "run", "sharding=single"), alone(*settings))


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("houlsby", "micro-batches of 2, recomputed"), pytest.param("pfeiffer", "zero 3 on 2", marks=pytest.mark.slow)],
)
def test_what_was_trained_computes_alike_in_its_run_on_a_plain_model_and_in_a_run_from_its_folder(
    variant: str, layout: str, worlds: Worlds, tiny: list[str], tied_model: Path, tmp_path: Path
) -> None:
    size, how = LAYOUTS[layout]
    trained = worlds.train(size, [*tiny, *ADAPTERS[variant], "steps=4", *how], tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tied_model)
    before = logits(model)
    attached = logits(attach(model, adapter_of(trained)))
    assert (attached - before).abs().max() > 1e-3
    with base_of(trained.folder) as module:
        torch.testing.assert_close(logits(module), attached, atol=1e-6, rtol=1e-6)
    rest = [text for text in tiny if not text.startswith("optimizer.lr")]
    idle = ["adapter=bottleneck", f"adapter.path={adapter_of(trained)}", "optimizer.lr=0", "steps=1"]
    again = worlds.train(1, [*rest, *idle, "sharding=single"], tmp_path / "again")
    with base_of(again.folder) as module:
        torch.testing.assert_close(logits(module), attached, atol=1e-6, rtol=1e-6)
    ours, theirs = (load_file(adapter_of(run) / "adapter_model.safetensors") for run in (again, trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("settings", "said", "cure"),
    [
        (
            ["sharding=fsdp", "sharding.tensor=2"],
            "cuts linear layers, which adapter=bottleneck puts modules of its own around or behind",
            "set sharding.tensor=1",
        ),
        (["adapter.layers=[5]"], "adapter.layers names '5', which matches no block", "set adapter.layers"),
        (["adapter.reduction=64"], "leaves nothing of the model's width 32", "set adapter.reduction to at most 32"),
        (["adapter.path=/nowhere"], "'/nowhere' holds no saved adapter", "set adapter.path"),
        (["adapter.variant=serial"], "adapter.variant=serial is no variant", "houlsby or pfeiffer"),
    ],
)
def test_what_cannot_be_is_refused_before_any_process_starts(
    settings: list[str], said: str, cure: str, tiny: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        api.check(api.compose([*tiny, "adapter=bottleneck", *settings], processes=2))
    assert said in str(caught.value) and cure in str(caught.value)
