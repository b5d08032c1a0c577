"""The loop from prompts to steps that learning from scored completions shares, whatever is learned of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from loomtune.contracts import Batch, Drawn, Loss, Objective, Reward, RoleSpec, Row, Sample, Sampling, Step
from loomtune.contracts.model import Tokenizer
from loomtune.contracts.objective import Roles
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """A group as a step has it: `whole`, or `lean`, without the completions of which nothing is learned."""

    whole: Sample
    lean: Sample


class Online(Objective):
    """Draws completions, has them scored, and learns from them.

    A sample has the column `rollout` (the engine's own log-probabilities, where it says them) and the numbers
    `sequences`, how many completions of the prompt were scored, `tokens`, how many of theirs count, whether or not
    anything is learned of them, and `first`.

    Those who inherit say in `batch` what steps come of completions.
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

    @abstractmethod
    def batch(self, run: Run, drawn: Sequence[Drawn]) -> Sequence[Sequence[Sample]]:
        """The steps that come of the completions of these prompts; none where nothing can be learned of them."""

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

    def _reference(self, roles: Roles, batch: Batch) -> Tensor:
        from loomtune.toolkit import log_probs

        return log_probs(roles[references.NAME], batch, temperature=self.settings.temperature)

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

    # What a checkpoint keeps

    def state(self) -> Mapping[str, Any]:
        return {"signs": self.signs.state(), "next": self.next and self.next.plain()}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.signs = telling.Signs.of(state.get("signs", {}))
        self.next = Next.parse(state["next"]) if state.get("next") else None


def mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """A metric that is a mean over these values: their sum, and how many they are."""
    return values.detach().sum(), values.new_tensor(float(values.numel()))
