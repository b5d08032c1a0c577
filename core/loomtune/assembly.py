"""From a plan to a run with all its parts, and from an objective's roles to engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loomtune.batching import CPU_TOKENS
from loomtune.catalogue import Catalogue
from loomtune.contracts import Adapter, Data, Engine, EngineSpec, Model, Objective, Role, RoleSpec, Sharding, Tracker
from loomtune.contracts.record import Record
from loomtune.events import Events
from loomtune.keeper import Keeper
from loomtune.lease import Lease
from loomtune.offers import Trait
from loomtune.placement import row_width
from loomtune.plan import Plan
from loomtune.records import join
from loomtune.role_models import models
from loomtune.run import Run
from loomtune.samplers import sampler, steps
from loomtune.samples import of_run
from loomtune.signals import StopRequest
from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """A run and what is needed to give it its models.

    models: of the roles that are other networks than the policy. whole: the adapter that adds nothing, for these.
    rehearses: whether engines are made of tensors without storage, for a step that is only looked at.
    """

    run: Run
    keeper: Keeper
    adapter: Adapter
    sharding: Sharding
    models: Mapping[str, Model] = field(default_factory=dict)
    whole: Adapter | None = None
    rehearses: bool = False

    def build_roles(self, *, trains: bool = True) -> None:
        """Builds an engine for every role that cannot be a view of another's, and the views.

        Of a role that is recorded only the records stay, of the splits that are used. They are made here, where the
        policy is what it began as, whatever a checkpoint makes of it: so a frozen twin is read from its own engine.
        trains: whether the training split is used.
        """
        wanted = self.run.objective.roles()
        records = {
            name: record
            for name, record in self.run.objective.records().items()
            if record.always or (self._owner(record.role, wanted) == record.role and not self.run.data.window)
        }
        absent = {record.role for record in records.values()}
        for name, record in records.items():
            if wanted[record.role].twin_of is None:
                self._record(name, record, trains)  # and let the role go, before others take memory
        engines: dict[str, Engine] = {}
        for name, role in wanted.items():
            if name in absent:
                continue
            owner = self._owner(name, wanted)
            if owner not in engines:
                heads = sorted({r.head for n, r in wanted.items() if self._owner(n, wanted) == owner})
                spec = self.spec(owner, wanted[owner], tuple(heads))
                engines[owner] = self._engine(spec)
            shared_and_frozen = owner != name and not role.trained
            view = Role(name, engines[owner], adapter=not shared_and_frozen, head=role.head, trained=role.trained)
            self.run.roles[name] = view
        for name, record in records.items():
            if wanted[record.role].twin_of is not None:
                self._record(name, record, trains)

    def _engine(self, spec: EngineSpec) -> Engine:
        if self.rehearses:
            return self.sharding.rehearsed(spec, self.run.world, self.run.settings.hardware.kind)
        return self.sharding.engine(spec, self.run.world)

    def _record(self, name: str, record: Record, trains: bool) -> None:
        """Joins what a role says to the samples of the splits that are used; a rehearsal has none."""
        if self.rehearses:
            return
        run, role = self.run, self.run.objective.roles()[record.role]
        model = self.models.get(record.role, run.model)
        made_of: list[object] = [role.head]
        if run.world.leads:  # one rank reads the files
            made_of.append(model.fingerprint())
            if model.draws or role.head != "lm":
                made_of.append(run.settings.seed)
            if role.twin_of is not None:
                made_of += [self.adapter.fingerprint(), dict(run.plan.choices("adapter"))]
        read = [split for one in run.evaluators.values() for split in one.reads(tuple(run.splits))]
        splits = list(dict.fromkeys(["train", *read] if trains else read))
        join(run, name, record, splits, run.world.broadcast(made_of), lambda: self._frozen(record.role, role))

    @contextmanager
    def _frozen(self, name: str, role: RoleSpec) -> Iterator[Role]:
        """A role as it is before the first step; a twin is what it starts from, where that has its head."""
        twin = self.run.roles.get(role.twin_of or "")
        if twin is not None and twin.head == role.head:
            yield replace(twin, name=name, adapter=self.adapter.saves_base, trained=False)
            return
        engine = self._engine(self.spec(name, role, (role.head,)))
        yield Role(name, engine, head=role.head, trained=False)
        engine.close()

    def _owner(self, name: str, wanted: Any) -> str:
        """The role whose engine serves this one: a twin's, where an adapter, or the objective, has it be shared."""
        twin = wanted[name].twin_of
        return name if twin is None or (self.adapter.saves_base and not wanted[name].shares) else twin

    def spec(self, name: str, role: RoleSpec, heads: tuple[str, ...]) -> EngineSpec:
        """What the engine of a role is made of, with these heads."""
        run, other = self.run, self.models.get(name)
        return EngineSpec(
            model=other or run.model,
            adapter=self.adapter if other is None or self.whole is None else self.whole,
            kernel=run.kernel,
            optimizer=run.optimizer if role.trained else None,
            precision=run.settings.precision,
            seed=run.settings.seed,
            heads=heads,
        )


def assemble(
    plan: Plan,
    folder: Path,
    catalogue: Catalogue,
    world: World,
    lease: Lease,
    *,
    observed: bool = True,
    stop: StopRequest | None = None,
    rehearsed: Callable[[Model], Model] | None = None,
) -> Assembly:
    """Builds every part that the plan names, and the run that holds them; no model yet.

    observed: with its trackers. stop: who asks this rank to leave; None: nobody. rehearsed: for a run that is only
    rehearsed, without samples and a sampler, what takes the place of each model.
    """
    root = plan.root
    sharding: Sharding = plan.build(catalogue, "sharding")
    sharding.check(world.size)
    world = _placed(world, sharding)
    trackers: dict[str, Tracker] = plan.build(catalogue, "tracker") if observed else {}
    splits = {} if rehearsed else of_run(folder)
    objective: Objective = plan.build(catalogue, "objective")
    objective.use(plan.build(catalogue, "loss"), rewards := plan.build(catalogue, "reward"))
    adapter: Adapter = plan.build(catalogue, "adapter")
    model: Model = plan.build(catalogue, "model")
    data: Data = plan.build(catalogue, "data")
    others = models(plan, catalogue)
    if rehearsed:
        model, others = rehearsed(model), {name: rehearsed(other) for name, other in others.items()}
        chosen, length = None, max(root.steps, 1)  # nobody draws
    else:
        chosen = sampler(root, splits["train"], data, row_width(root, model, adapter.virtual_tokens))
        counted = json.loads((folder / "samples.json").read_text())["train"].get("steps")
        length = counted or steps(root, chosen, objective)
    run = Run(
        plan=plan,
        settings=root,
        folder=folder,
        world=world,
        events=_events(catalogue, trackers, world),
        model=model,
        tokenizer=model.tokenizer(),
        data=data,
        objective=objective,
        optimizer=adapter.optimizer(plan.build(catalogue, "optimizer"), length),
        schedule=plan.build(catalogue, "schedule"),
        kernel=next(iter(plan.build(catalogue, "kernel").values())),
        rollout=plan.build(catalogue, "rollout"),
        evaluators=plan.build(catalogue, "evaluator"),
        rewards=rewards,
        guards=list(plan.build(catalogue, "guard").values()),
        trackers=trackers,
        splits=splits,
        sampler=chosen,  # type: ignore[arg-type]
        steps=length,
        attempt=lease.attempt,
        token_budget=CPU_TOKENS,
        virtual_tokens=adapter.virtual_tokens,
        stop=stop or StopRequest(),
    )
    return Assembly(
        run=run,
        keeper=Keeper(run, adapter, lease),
        adapter=adapter,
        sharding=sharding,
        models=others,
        whole=_whole(catalogue),
        rehearses=rehearsed is not None,
    )


def _whole(catalogue: Catalogue) -> Adapter:
    """The adapter that leaves a model as it is: a frozen role is nothing but its model."""
    name = next(e.offer.name for e in catalogue.entries("adapter") if Trait.WHOLE_MODEL in e.offer.provides)
    adapter: Adapter = catalogue.build("adapter", name, {})
    return adapter


def _placed(world: World, sharding: Sharding) -> World:
    """The world with its data replicas; of ranks that share their rows, the first one counts."""
    replica, replicas = sharding.replicas(world)
    counts = world.gather(replica).index(replica) == world.rank
    return replace(world, replica=replica, replicas=replicas, counts=counts)


def _events(catalogue: Catalogue, trackers: dict[str, Tracker], world: World) -> Events:
    """Every plugin hears the events, and so do the trackers that belong on this rank."""
    plugins = [(name, catalogue.manager.get_plugin(name)) for name in catalogue.sources]
    here = [(f"tracker {name}", t) for name, t in trackers.items() if world.leads or t.every_rank]
    return Events([(name, plugin) for name, plugin in [*plugins, *here] if plugin is not None])
