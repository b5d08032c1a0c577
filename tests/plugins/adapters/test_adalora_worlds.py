"""AdaLoRA, IA3 and OFT on several processes: one curve, and checkpoints that any layout reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loomtune import api
from loomtune.errors import UserError
from loomtune.export import export
from runs.curves import largest
from runs.worlds import Outcome, Worlds

ADAPTERS = {
    "adalora": [
        "adapter=adalora", "adapter.init_rank=6", "adapter.target_rank=2", "adapter.tinit=1", "adapter.tfinal=2",
        "adapter.delta_t=1", "adapter.dropout=0.1", "optimizer.lr=1e-2",
    ],
    "ia3": ["adapter=ia3", "optimizer.lr=1e-1"],
    "oft": ["adapter=oft", "adapter.block_size=8", "optimizer.lr=1e-2"],
    "oft, solved and shared": [
        "adapter=oft", "adapter.blocks=4", "adapter.neumann_terms=0", "adapter.block_share=true", "optimizer.lr=1e-2",
    ],
    "coft": ["adapter=coft", "adapter.block_size=8", "adapter.eps=0.03", "optimizer.lr=1e-2"],
}  # fmt: skip
LAYOUTS = {
    "ddp": ["sharding=ddp"],
    "fsdp": ["sharding=fsdp"],
    "fsdp, offloaded": ["sharding=fsdp", "sharding.offload=true"],
    "fsdp, recomputed": ["sharding=fsdp", "sharding.activation_checkpointing=true", "batch.micro=2"],
    "zero 2": ["sharding=zero", "sharding.stage=2"],
    "zero 3": ["sharding=zero", "sharding.stage=3", "sharding.persist=0"],
}
EVERYDAY = [("adalora", "fsdp")]
SHAPED = ("adalora", "coft")
LOSS, NORM = 5e-6, 1e-5
STEPS = 6

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tiny(tied_model: Path, mixed_data: Path) -> list[str]:
    return [
        f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "tracker=[jsonl]", f"steps={STEPS}",
        "checkpoint.background=false", "checkpoint.every=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """The run of an adapter on one process, made once."""
    made: dict[str, Outcome] = {}

    def of(adapter: str) -> Outcome:
        if adapter not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[adapter] = worlds.train(1, [*tiny, *ADAPTERS[adapter], "sharding=single"], folder)
        return made[adapter]

    return of


def agree(one: Outcome, other: Outcome) -> None:
    loss, norm = (largest(one.series(name), other.series(name)) for name in ("loss", "grad_norm"))
    assert loss < LOSS and norm < NORM, f"relative differences: loss {loss:.1e}, gradient norm {norm:.1e}"


def ranks(outcome: Outcome) -> list[int]:
    """What is left of each layer's entries in what the run saved."""
    tensors = load_file(outcome.folder / f"checkpoints/step-{STEPS:08d}/adapter/adapter_model.safetensors")
    return [int(entries.count_nonzero()) for name, entries in sorted(tensors.items()) if name.endswith("lora_E")]


WAYS = [
    pytest.param(adapter, layout, marks=() if (adapter, layout) in EVERYDAY else pytest.mark.slow)
    for adapter, layout in product(ADAPTERS, LAYOUTS)
    if not (adapter in SHAPED and layout.startswith("zero"))
]


@pytest.mark.parametrize(("adapter", "layout"), WAYS)
def test_every_layout_gives_the_curve_of_one_process(
    adapter: str, layout: str, worlds: Worlds, tiny: list[str], alone: Callable[[str], Outcome], tmp_path: Path
) -> None:
    ours = worlds.train(2, [*tiny, *ADAPTERS[adapter], *LAYOUTS[layout]], tmp_path / "run")
    agree(ours, alone(adapter))
    assert len(set(ours.series("loss"))) == STEPS, "it learns"
    if adapter == "adalora":
        assert ranks(ours) == ranks(alone(adapter))
        assert sum(ranks(ours)) == 2 * len(ranks(ours)), "ranks fell to the target"


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_exported_computes_alike(adapter: str, alone: Callable[[str], Outcome], tmp_path: Path) -> None:
    """Which the exporter compares, and leaves nothing behind where it is not so."""
    assert (export(alone(adapter).folder, tmp_path / "out") / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize(("before", "after"), [("fsdp", 1), ("ddp", 2), ("single", 2)])
def test_adalora_goes_on_from_a_checkpoint_of_another_layout(
    stop: int, before: str, after: int, worlds: Worlds, tiny: list[str], alone: Callable[[str], Outcome], tmp_path: Path
) -> None:
    """While ranks fall (3), and when they stand (5)."""
    folder = tmp_path / "run"
    size = 1 if before == "single" else 2
    settings = [*tiny, *ADAPTERS["adalora"], f"sharding={before}", f"stop_after={stop}"]
    assert worlds.train(size, settings, folder).result["status"] == "stopped"
    resumed = worlds.resume(after, folder, "sharding=single" if after == 1 else "sharding=fsdp")
    assert resumed.result["step"] == STEPS
    agree(resumed, alone("adalora"))


def test_a_run_too_short_is_refused_before_any_process_exists(worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)tinit=4 and adapter.tfinal=2 leave none of 6 steps.*at most 5"):
        worlds.train(1, [*tiny, "adapter=adalora", "adapter.tinit=4", "adapter.tfinal=2"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_epochs_is_too_short_as_soon_as_its_rows_are_counted(tiny: list[str], tmp_path: Path) -> None:
    given = [text for text in tiny if not text.startswith("steps")]
    spans = ["adapter=adalora", "adapter.tinit=4", "adapter.tfinal=4", f"run.dir={tmp_path / 'run'}"]
    plan = api.compose([*given, *spans, "epochs=1"], processes=1)
    api.check(plan)
    with pytest.raises(UserError, match=r"(?s)tinit=4 and adapter.tfinal=4 leave none of 8 steps.*at most 7"):
        api.prepare(plan)
    assert not (tmp_path / "run").exists()
    assert api.prepare(api.compose([*given, *spans, "epochs=1.2"], processes=1)) == tmp_path / "run"


@pytest.mark.parametrize("adapter", SHAPED)
def test_what_needs_shapes_is_refused_under_zero(adapter: str, worlds: Worlds, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="flat parts"):
        worlds.train(2, [*tiny, *ADAPTERS[adapter], *LAYOUTS["zero 3"]], tmp_path / "run")
