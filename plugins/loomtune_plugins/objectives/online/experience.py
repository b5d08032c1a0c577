"""The loop from prompts to steps that learning from scored completions shares, whatever is learned of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Batch, Drawn, Loss, LossSums, Objective, Reward, RoleSpec, Row, Sample, Sampling, Step
from loomtune.contracts.model import Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import UserError
from loomtune.seeds import derive
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.online import groups as made
from loomtune_plugins.objectives.online import prompts, telling
from loomtune_plugins.objectives.online.ahead import Next, Turn
from loomtune_plugins.objectives.online.groups import Group, Scored
from loomtune_plugins.objectives.online.invariants import FIRST, FRESH, LATER, OLDER, Bounds
from loomtune_plugins.objectives.online.settings import OnlineSettings

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.run import Run
    from loomtune.world import World
    from loomtune_plugins.objectives.online.watching import Metrics, Watch

Columns = Mapping[str, Sequence[Sequence[Any]]]
"""By name, for each group, of each completion that is kept: a number, or `(tokens,)`."""


@dataclass(frozen=True, slots=True)
class Batched:
    """A batch of completions, of which steps are made. columns: what roles said of them."""

    groups: Sequence[Group]
    columns: Columns


@dataclass(frozen=True, slots=True)
class Prepared:
    """A group as a step has it: `whole`, or `lean`, without the completions of which nothing is learned."""

    whole: Sample
    lean: Sample


class Online(Objective):
    """Draws completions, has them scored, and learns from them.

    A sample has the columns `old` (the policy's log-probabilities before the batch's first step, or with
    `rollout.ahead` those that it was drawn with; absent where there is one step only, which has them itself),
    `reference` (where `beta` is not 0), `rollout` (the engine's own) and those that `credit` gives; and the numbers
    `sequences`, how many completions of the prompt were scored, `tokens`, how many of theirs count, whether or not
    anything is learned of them, and `first`.

    Those who inherit say in `credit` what completions are worth, in `weights` what the loss is divided by, and in
    `learned` what is minimised. They may add roles, columns that roles fill, and numbers.
    """

    settings: OnlineSettings
    beta: float = 0.0
    """How strongly the KL to the reference counts, in the loss or in the reward. The reference takes part where this is
    not 0."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.rewards: Mapping[str, Reward] = {}
        self.bounds = Bounds()
        self.signs = telling.Signs()
        self.next: Next | None = None
        self.turn: Turn | None = None

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Takes any number of rewards, whose weighted sum is learned from, and no loss."""
        super().use(losses, {})
        self.rewards = dict(rewards)
        if not any(reward.weight for reward in rewards.values()):
            what = "every chosen reward has the weight 0" if rewards else "no reward says what a completion is worth"
            raise UserError.of(what, "set reward=[...] to some that `loomtune plugins` lists, one with a weight")

    def takes_rewards(self) -> bool:
        return True

    # Roles

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, the reference where a KL to it counts, and what rewards read."""
        own = references.roles() if self.beta else super().roles()
        return {**own, **{name: spec for reward in self.rewards.values() for name, spec in reward.roles().items()}}

    # Rows

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """The prompt alone."""
        return prompts.sample(self.prompt(row, tokenizer), max_length)

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The tokens that are completed."""
        return prompts.prompt(row, tokenizer, self.settings)

    def fingerprint(self) -> str:
        return prompts.fingerprint(self.settings)

    def keeps_rows(self) -> bool:
        return True

    def needs_targets(self) -> bool:
        return False

    def parts(self) -> Sequence[str]:
        return ("prompt", *("completion" for _ in range(self.settings.group)))

    # Steps

    def steps_per_batch(self) -> int:
        return self.settings.epochs * self.settings.minibatches

    def experience(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """Every optimizer step that comes of these prompts, see `docs/decisions/0013-rlhf.md`.

        None where nobody knows what any completion is worth; the run then draws other prompts.
        """
        self.bounds = Bounds.of(run.settings.precision, run.rollout)
        if not run.rollout or not run.rollout.ahead:
            return self.batch(run, drawn)
        self.turn = Turn(self.next, drawn, run, last=run.step + self.steps_per_batch() >= run.steps)
        try:
            found = self.batch(run, self.turn.drawn)
            self.next = self.turn.over()
        finally:
            self.turn = None
        return found

    def batch(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """The steps that come of the completions of these prompts."""
        groups = self.gathered(run, drawn)
        if not any(group.kept for group in groups):
            self.signs.nothing_scored(run)
            return []
        batch = self.read(run, groups)
        credit = self.credit(batch)
        telling.tell(run, groups, credit["advantage"])
        self.signs.look(run, groups)
        steps = self.steps(run, groups, self.prepared(batch, credit))
        self.signs.learned(run, bool(steps))
        return steps

    def gathered(self, run: Run, drawn: Sequence[Drawn]) -> list[Group]:
        """The groups that a batch is made of, scored."""
        return self.scored(run, self.completed(run, drawn))

    def completed(self, run: Run, drawn: Sequence[Drawn]) -> list[Group]:
        """The groups, as the policy draws them now, or was begun to draw them ahead; not scored yet."""
        settings = self.settings
        sampling = Sampling(
            max_tokens=settings.max_new_tokens,
            max_length=run.max_length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop=run.tokenizer.stops,
        )
        begin = partial(made.begin, run, count=settings.group, sampling=sampling)
        with telling.timed(run, "rollout_seconds"):
            found = self.turn.completed(drawn, begin) if self.turn else begin(drawn)()
        run.heed("asked to leave during a rollout, which begins anew")
        telling.counted(run, found)
        return made.grouped(run, drawn, found)

    def scored(self, run: Run, groups: Sequence[Group]) -> list[Group]:
        """The groups with their rewards."""
        with telling.timed(run, "reward_seconds"):
            return made.score(run, groups, self.rewards)

    def counts(self, one: Scored) -> bool:
        """Whether a completion that was scored is learned from."""
        return one.answer.ended or not self.settings.mask_truncated

    def idles(self, advantage: Any) -> bool:
        """Whether a completion with this advantage has no gradient, so that nobody need compute it."""
        return False

    def reads(self) -> bool:
        """Whether roles are asked anything before the first step."""
        return (self.reads_old() and not self.turn) or self.beta != 0

    def said(self, roles: Roles, batch: Batch) -> dict[str, Tensor]:
        """What roles say of a batch's targets before anything is learned, `(targets,)` by the names of the columns."""
        found: dict[str, Tensor] = {}
        if self.reads_old() and not self.turn:
            found["old"] = self._old(roles, batch)
        if self.beta:
            found["reference"] = self._reference(roles, batch)
        return found

    def reads_old(self) -> bool:
        """Whether the policy's log-probabilities are needed before the first step, which could tell them itself."""
        return self.steps_per_batch() > 1

    def read(self, run: Run, groups: Sequence[Group]) -> Batched:
        """What roles say of the groups' completions, each read once."""
        import torch

        columns: dict[str, list[list[Any]]] = {}
        names: list[str] = []

        def reader(roles: Roles, batch: Batch) -> Tensor:
            said = self.said(roles, batch)
            names[:] = said
            return torch.stack(list(said.values()), 1)

        if self.reads():
            with telling.timed(run, "read_seconds"):
                found = run.read([self._laid(group, {}) for group in groups], reader)
            each = [made.apart(group, values) for group, values in zip(groups, found, strict=True)]
            columns = {name: [[one[:, i] for one in part] for part in each] for i, name in enumerate(names)}
        if all(len(one.log_probs) == len(one.answer.tokens) for group in groups for one in group.kept):
            columns["rollout"] = [[np.array(one.log_probs) for one in group.kept] for group in groups]
        if self.turn:
            columns["old"] = Turn.old(columns)
        return Batched(groups, columns)

    def _laid(self, group: Group, columns: Mapping[str, Sequence[Any]], which: Sequence[bool] | None = None) -> Sample:
        learned = [True] * len(group.kept) if which is None else which
        return made.laid(group, learned, shared=self.settings.group > 1, columns=columns)

    def _old(self, roles: Roles, batch: Batch) -> Tensor:
        from loomtune.toolkit import log_probs

        policy = roles["policy"]
        with policy.engine.evaluating():
            return log_probs(policy, batch, temperature=self.settings.temperature)

    def _reference(self, roles: Roles, batch: Batch) -> Tensor:
        from loomtune.toolkit import log_probs

        return log_probs(roles[references.NAME], batch, temperature=self.settings.temperature)

    def credit(self, batch: Batched) -> Columns:
        """What completions are credited with: `advantage`, and what else the loss needs of their tokens."""
        raise NotImplementedError

    def prepared(self, batch: Batched, credit: Columns) -> list[Prepared]:
        """The groups as samples, with all columns and numbers."""
        found = []
        for i, group in enumerate(batch.groups):
            columns = {name: values[i] for name, values in {**batch.columns, **credit}.items()}
            counted = [self.counts(one) for one in group.kept]
            moves = [c and not self.idles(a) for c, a in zip(counted, columns["advantage"], strict=True)]
            tokens = sum(len(one.answer.tokens) for one, counts in zip(group.kept, counted, strict=True) if counts)
            numbers = {"sequences": float(len(group.kept)), "tokens": float(tokens), "first": LATER}
            laid = [replace(self._laid(group, columns, which), numbers=numbers) for which in (counted, moves)]
            found.append(Prepared(*laid))
        return found

    def steps(self, run: Run, groups: Sequence[Group], prepared: Sequence[Prepared]) -> list[list[Sample]]:
        """The samples of each step: every epoch in an order of its own, cut into minibatches; none without a target."""
        found: list[list[Sample]] = []
        for epoch in range(self.settings.epochs):
            key = derive(run.settings.seed, "inner", groups[0].drawn.visit, epoch)
            order = np.random.default_rng(key).permutation(len(prepared))
            for part in np.array_split(order, self.settings.minibatches):
                lean, whole = [prepared[i].lean for i in part], [prepared[i].whole for i in part]
                found += [step for step in map(made.folded, (lean, whole)) if step][:1]
        if found:
            fresh = FRESH if run.step == 0 and telling.is_fresh(run) else FIRST
            fresh = OLDER if self.turn and self.turn.older else fresh
            found[0] = [replace(one, numbers={**one.numbers, "first": fresh}) for one in found[0]]
        return found

    # Loss

    def statistics(self, roles: Roles, step: Step, world: World) -> Mapping[str, Any]:
        """What goes along with the step's micro-batches to tell its extremes, and whether it is a batch's first."""
        from loomtune_plugins.objectives.online.watching import Watch

        mine = max((float(b.columns["first"].max()) for b in step if len(b.columns.get("first", ()))), default=LATER)
        return {"watch": Watch(world, len(step), max(world.gather(mine)), self.bounds)}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """What `learned` makes of the policy's log-probabilities of the targets."""
        from loomtune.toolkit import entropy, observed

        found, entropies = observed(roles["policy"], batch, [entropy], temperature=self.settings.temperature)
        value, ratio, metrics = self.learned(found, batch)
        metrics |= {"entropy": mean(entropies)}
        watch: Watch = statistics["watch"]
        metrics |= watch.see(found.detach(), ratio.detach(), batch)
        return LossSums({"policy": value}, metrics)

    def terms(self) -> Mapping[str, str]:
        return {"policy": "policy"}

    def learned(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """What is minimised, summed over the targets `(targets,)` of a micro-batch; the importance ratio `(targets,)`;
        and what is logged. log_probs: of the policy, with gradient."""
        raise NotImplementedError

    def old(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """`(targets,)`: the log-probabilities before the batch's first step."""
        return batch.columns.get("old", log_probs.detach())

    # What a checkpoint keeps

    def state(self) -> Mapping[str, Any]:
        return {"signs": self.signs.state(), "next": self.next and self.next.plain()}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.signs = telling.Signs.of(state.get("signs", {}))
        self.next = Next.parse(state["next"]) if state.get("next") else None


def mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric that is a mean over these values: their sum, and how many they are."""
    return values.detach().sum(), values.new_tensor(float(values.numel()))
