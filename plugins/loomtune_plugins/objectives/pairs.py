"""What the objectives that learn from pairs of answers have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from loomtune.contracts import Batch, DistributionLoss, Loss, LossSums, Objective, Pairs, Reward, Row, Sample, Step
from loomtune.contracts.model import Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault, UserError
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.answers import CHOSEN, PAIR, PROMPT, REJECTED, asked, compared, probability, too_small
from loomtune_plugins.objectives.encoding import BOS, refuse, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.toolkit.log_probs import Look
    from loomtune.world import World
    from loomtune_plugins.objectives.pairs_settings import PairsSettings

VERSION = 4
"""Part of the fingerprint: raise it when the same row gives other tokens."""


class Pairwise(Objective):
    """Prefers one answer to another. Which loss it minimises is a choice of its own (`loss=`), or a mixture."""

    refers: ClassVar[bool] = False
    """True where a frozen reference takes part."""

    learns_prompts: bool = False
    """True where prompts are targets too."""

    def __init__(self, settings: PairsSettings) -> None:
        refuse([*unknown(settings, bos=BOS), *too_small(settings)])
        self.settings = settings
        self.losses: dict[str, Loss] = {}

    def use(self, losses: Mapping[str, Loss], rewards: Mapping[str, Reward]) -> None:
        """Takes any mixture of losses of pairs; one that needs a reference only where there is one."""
        super().use({}, rewards)
        self.losses = dict(losses)
        if not losses:
            raise UserError.of("no loss is chosen", "set loss=[sigmoid], or another that `loomtune plugins` lists")
        refuse([*self._without_reference(), *self._without_effect()])
        if not any(loss.weight for loss in losses.values()):
            raise UserError.of("every chosen loss has the weight 0", f"set loss.{next(iter(losses))}.weight above 0")

    def _without_reference(self) -> Iterator[Fault]:
        for name, loss in self.losses.items():
            if loss.needs_reference and not self.refers:
                what = f"loss={name} compares with a reference, which this objective has none of"
                yield Fault(what, f"leave loss={name} out, or set objective=dpo")

    def _without_effect(self) -> Iterator[Fault]:
        defaults = type(self.settings)()
        for key, read in self.read().items():
            if not read and (value := getattr(self.settings, key)) != getattr(defaults, key):
                what = f"objective.{key}={str(value).lower()} has no effect with loss=[{','.join(self.losses)}]"
                yield Fault(what, f"leave objective.{key} out, or choose a loss that it changes")

    def read(self) -> dict[str, bool]:
        """The settings that some losses pass over, and whether one that is chosen does not."""
        chosen = self.losses.values()
        heeded = any(loss.by_probability for loss in chosen)
        return {"beta": any(_prefers(loss) for loss in chosen), "probability": heeded}

    def terms(self) -> Mapping[str, str]:
        """One for each loss."""
        return dict.fromkeys(self.losses, "policy")

    def parts(self) -> Sequence[str]:
        return PAIR

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """The prompt, and both answers behind it; without targets where one of them is cut off whole."""
        segments = compared(row, tokenizer, self.settings, max_length, prompts=self.learns_prompts)
        named = self.settings.probability
        return Sample(segments, {"probability": probability(row, named)} if named else {})

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The tokens before both answers."""
        return asked(row, tokenizer, self.settings)

    def fingerprint(self) -> str:
        """Digest of the settings that decide on tokens, and of the version of `sample`."""
        kept: list[Any] = [self.settings.separator, self.settings.bos, self.settings.system, self.learns_prompts]
        kept += [self.settings.probability] if self.settings.probability else []
        return hashlib.sha256(json.dumps(["pairs", VERSION, *kept]).encode()).hexdigest()

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Pairs, or the tokens of chosen answers and of learned prompts for a loss that is a mean over these.

        The tokens of both answers for one that compares distributions.
        """
        pairs, tokens = float((batch.part == CHOSEN).sum()), float((batch.part != REJECTED)[batch.row].sum())
        both = float((batch.part != PROMPT)[batch.row].sum())
        return {
            name: both if isinstance(loss, DistributionLoss) else tokens if loss.by_tokens else pairs
            for name, loss in self.losses.items()
        }

    def statistics(self, roles: Roles, step: Step, world: World) -> Mapping[str, Any]:
        """Of the losses that look at the whole step."""
        looking = {name: loss for name, loss in self.losses.items() if loss.looks_around}
        seen = [self.pairs(roles, batch)[0] for batch in step] if looking else []
        return {name: loss.statistics(seen, world) for name, loss in looking.items()}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Each loss of the mixture, summed over the pairs."""
        pairs, whole, metrics = self.pairs(roles, batch)
        terms = {}
        for name, loss in self.losses.items():
            values = loss.of(whole if loss.by_tokens else pairs, statistics.get(name))
            of_answers = not isinstance(loss, DistributionLoss)
            terms[name] = loss.weight * (values * pairs.importance if of_answers else values).sum()
        return LossSums(terms, metrics)

    def pairs(self, roles: Roles, batch: Batch) -> tuple[Pairs, Pairs, dict[str, tuple[Tensor, Tensor]]]:
        """What losses are told of a micro-batch, the same with every token counted whole, and what is logged of it.

        One pass over the policy.
        """
        import torch

        from loomtune.toolkit import row_sums

        targets, seen, known, apart = self._read(roles, batch)
        tokens = row_sums(torch.ones_like(targets), batch)
        chosen, rejected, prompt = batch.part == CHOSEN, batch.part == REJECTED, first_copies(batch)

        def sums(shares: Tensor) -> dict[str, Any]:
            policy, reference = row_sums(targets * shares, batch), row_sums(known * shares, batch)
            either = {"chosen": policy[chosen], "rejected": policy[rejected]}
            return either | {"reference_chosen": reference[chosen], "reference_rejected": reference[rejected]}

        whole, counted = sums(torch.ones_like(targets)), sums(self.shares(batch))
        pairs = Pairs(
            beta=self.settings.beta,
            **counted,
            chosen_tokens=tokens[chosen],
            rejected_tokens=tokens[rejected],
            prompt=row_sums(targets, batch)[prompt],
            prompt_tokens=tokens[prompt],
            chosen_logits=self.preference(counted["chosen"] - counted["reference_chosen"]),
            rejected_logits=self.preference(counted["rejected"] - counted["reference_rejected"]),
            importance=self.importance(targets.detach(), seen[self.settings.entropy :], batch),
            distances={loss: _answers(values, batch) for loss, values in apart.items()},
            probability=batch.columns.get("probability"),
        )
        metrics = self._metrics(pairs, plain := replace(pairs, **whole))
        metrics |= {name: _mean(apart[loss]) for name, loss in self.losses.items() if loss in apart}
        if self.settings.entropy:
            metrics["entropy"] = _mean(seen[0])
        return pairs, plain, metrics

    def _read(self, roles: Roles, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor, dict[DistributionLoss, Tensor]]:
        """`(targets,)` each: log-probabilities, what the looks saw, the reference's, distances of losses that ask.

        The reference's are zeros where there is none.
        """
        import torch

        from loomtune.toolkit import entropy, observed

        looks = [entropy, *self.looks()] if self.settings.entropy else self.looks()
        asking = [loss for loss in self.losses.values() if isinstance(loss, DistributionLoss)]
        if not asking:
            targets, *seen = observed(roles["policy"], batch, looks)
            return targets, seen, self.reference(roles, batch) if self.refers else torch.zeros_like(targets), {}
        from loomtune_plugins.objectives.side_by_side import observed_beside

        both, distances = (roles["policy"], roles["reference"]), [loss.distance for loss in asking]
        (targets, *seen), reference, apart = observed_beside(both[0], both[1], batch, looks, distances)
        return targets, seen, reference, dict(zip(asking, apart, strict=True))

    def looks(self) -> list[Look]:
        """What `importance` needs to see of the policy's logits."""
        return []

    def shares(self, batch: Batch) -> Tensor:
        """`(targets,)`: what each target's log-probability counts in the preference for its answer."""
        import torch

        return torch.ones(len(batch.target), device=batch.target.device)

    def importance(self, targets: Tensor, seen: Sequence[Tensor], batch: Batch) -> Tensor:
        """`(pairs,)`: what each pair counts. targets: `(targets,)` log-probabilities. seen: what the looks saw."""
        return targets.new_ones(int((batch.part == CHOSEN).sum()))

    def reference(self, roles: Roles, batch: Batch) -> Tensor:
        """Log-probability `(targets,)` of each target under the reference."""
        return references.said(roles, batch)

    def preference(self, log_ratio: Tensor) -> Tensor:
        """How much an answer is preferred, of the log-ratio of policy and reference `(pairs,)`."""
        return log_ratio

    def _metrics(self, pairs: Pairs, whole: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over pairs, by the names that users know from elsewhere."""
        rewards = [
            pairs.beta * (answer - reference).detach()
            for answer, reference in (
                (pairs.chosen, pairs.reference_chosen),
                (pairs.rejected, pairs.reference_rejected),
            )
        ]
        found = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "logps/chosen": whole.chosen.detach(),
            "logps/rejected": whole.rejected.detach(),
        }
        return {name: _mean(value) for name, value in found.items()}


def _prefers(loss: Loss) -> bool:
    """Whether it weighs one answer against the other, so that how much a preference counts matters."""
    return not (loss.by_tokens or isinstance(loss, DistributionLoss))


def _answers(values: Tensor, batch: Batch) -> Tensor:
    """`(pairs,)`: one number a target, summed over both answers."""
    from loomtune.toolkit import row_sums

    sums = row_sums(values, batch)
    return sums[batch.part == CHOSEN] + sums[batch.part == REJECTED]


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.detach().sum(), values.new_tensor(float(len(values)))


def first_copies(batch: Batch) -> Tensor:
    """`(segments,)` bool: the prompts, each once. Where it is computed for each answer, the first has the targets."""
    import torch

    owners = torch.cat([batch.sample_of_segment.new_full((1,), -1), batch.sample_of_segment])
    return (batch.part == PROMPT) & (owners[1:] != owners[:-1])
