"""A plan, rehearsed: one rank's first steps, seen from their birth on. Imports torch; see `child` for who must not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.plan import Plan
from loomtune_plugins.planner.depth import deep, depths
from loomtune_plugins.planner.trace import Peak, Trace

if TYPE_CHECKING:
    from loomtune.contracts import Batch
    from loomtune.run import Run

MANY = 4
"""Micro-batches of a step that are all rehearsed, where they are of many shapes."""

STEPS = 2
"""The second has all that the first leaves behind, such as the optimizer's state."""


def rehearse(
    plan: Plan, processes: int, rank: int = 0, *, rows: Sequence[Sequence[int]] = (), whole: bool = False
) -> Trace:
    """One optimizer step of a rank among so many processes, deep models from shallow ones.

    rows: words of each row's prompt and answers; see `loomtune.rehearsal.batches`. whole: every block is traced.
    """
    from loomtune.catalogue import installed

    count, period = plan.build(installed(), "model").depth()
    if whole or not depths(count, period):
        return traced(plan, processes, rank, rows=rows)
    return deep(lambda blocks: traced(plan, processes, rank, rows=rows, blocks=blocks), count, period)


def traced(plan: Plan, processes: int, rank: int = 0, *, rows: Sequence[Sequence[int]] = (), blocks: int = 0) -> Trace:
    """The step of a model of so many blocks; 0: all of them."""
    from loomtune.rehearsal import batches, rehearsed
    from loomtune.stepping import Stepper
    from loomtune.toolkit.placing import on_host
    from loomtune_plugins.planner.observing import Observer
    from loomtune_plugins.planner.observing_inside import ACCELERATORS
    from loomtune_plugins.planner.observing_marks import Marks, label
    from loomtune_plugins.planner.observing_memory import Memory
    from loomtune_plugins.planner.rollouts import generated

    memory = Memory(1 if plan.root.hardware.kind in ("", "cpu") else 512)
    kind, offload = plan.root.hardware.kind, plan.chosen("sharding").get("offload")
    observer, hosted = Observer(memory, kind), kind in ACCELERATORS and offload is True
    with rehearsed(plan, processes, rank, blocks) as assembly, observer.looking():
        run = assembly.run
        with on_host(hosted):
            assembly.build_roles()
        label(observer, run, hosted)
        made = batches(run, rows)
        taken = chosen(made)
        stepper, several = Stepper(run), [batch for batch, _ in taken]
        with Marks(observer, run, [times for _, times in taken], hosted).following() as marks:
            for step in range(STEPS):
                marks.begin(counts=step == STEPS - 1)
                totals = stepper.totals(several)
                stepper.accumulate(several, totals)
                label(observer, run, hosted)
                with on_host(hosted):
                    stepper.update(run.optimizer.learning_rate, 1.0)
                label(observer, run, hosted)
        kept = {cause: count for cause, count in memory.causes.items() if count}
        collectives, work = observer.told()
        noted = generated(observer, run, rows)
        return Trace(
            rank=rank,
            processes=processes,
            blocks=float(blocks or run.model.depth()[0]),
            moments=in_order(memory.moments),
            kept=kept,
            host={cause: count for cause, count in memory.host.items() if count},
            collectives=collectives,
            work=work,
            tokens=sum(batch.tokens.numel() for batch in made),
            targets=sum(len(batch.target) for batch in made),
            micro=len(made),
            parameters=_parameters(run),
            notes=noted,
        )


def in_order(moments: Mapping[str, Peak]) -> dict[str, Peak]:
    """With those of the rollout, which is looked at last, where a step has it: after birth."""
    return dict(sorted(moments.items(), key=lambda one: (not one[0].startswith("birth"), "rollout" not in one[0])))


def chosen(batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
    """The micro-batches that are rehearsed, and how many of the step each stands for.

    Alike ones by two, the first and the last, which differ in what is reduced; of many others, the largest between.
    """
    shapes = {(tuple(batch.tokens.shape), len(batch.target)) for batch in batches}
    if len(batches) < 3 or (len(shapes) > 1 and len(batches) <= MANY):
        return [(batch, 1.0) for batch in batches]
    ends = [(batches[0], len(batches) - 1.0), (batches[-1], 1.0)]
    if len(shapes) == 1:
        return ends
    largest = max(batches, key=lambda batch: batch.tokens.numel())
    tokens = [batch.tokens.numel() for batch in batches]
    between = (sum(tokens) - tokens[-1] - largest.tokens.numel()) / max(tokens[0], 1)
    return [(batches[0], between), (largest, 1.0), ends[1]]


def _parameters(run: Run) -> tuple[int, int, int]:
    """(all, trained, active for a token) of the policy: packed and partitioned ones as what they stand for."""
    import torch

    engine: Any = run.policy.engine
    with torch.device("meta"):
        base: Any = run.model.skeleton()
    own = {name.removeprefix("module."): p for name, p in engine.network.named_parameters()}
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in own.items()}
    added = sum(size for name, size in sizes.items() if run.policy.engine.spec.adapter.base_name(name) is None)
    every = sum(p.numel() for p in base.parameters()) + added
    config = base.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    apart = sum(p.numel() for p in base.parameters() if p.ndim == 3 and p.shape[0] == experts > 1)
    idle = apart * (1 - getattr(config, "num_experts_per_tok", experts) / experts)
    return every, sum(sizes[name] for name, p in own.items() if p.requires_grad), round(every - idle)
