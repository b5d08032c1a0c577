"""Learning from single answers, of which is known whether they are wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, LossSums, Objective, Record, RoleSpec, Row, Sample, Segment, Step, Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault
from loomtune_plugins.objectives import references
from loomtune_plugins.objectives.answers import PROMPT, asked, compared, too_small
from loomtune_plugins.objectives.encoding import BOS, lacking, refuse, unknown
from loomtune_plugins.objectives.kto_settings import VARIANTS, KtoSettings

if TYPE_CHECKING:
    from torch import Tensor

    from loomtune.world import World

VERSION = 4
"""Part of the fingerprint: raise it when the same row gives other tokens."""

ANSWER, MISMATCHED = 1, 2
"""The segments behind the prompt: the row's own answer, and that of the row after it in the step."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a whole step says of each of its examples.

    baseline: z0, the mean log-ratio of policy and reference on answers to other prompts, and never below 0.
    counts: unwanted and wanted answers. references: each batch with the reference's log-probabilities `(targets,)`.
    """

    baseline: float
    counts: tuple[float, float]
    references: Sequence[tuple[Batch, Tensor]] = ()

    def reference(self, batch: Batch) -> Tensor | None:
        """What was read of this very batch."""
        return next((numbers for known, numbers in self.references if known is batch), None)


class Kto(Objective):
    """Ethayarajh et al. 2024, "KTO", equations 7 and 8, and D'Oosterlinck et al. 2024, "APO", for unpaired answers.

    With r = log policy(y|x) - log reference(y|x) the loss is w (1 - sigmoid(beta (r - z0))) of a wanted answer and
    w (1 - sigmoid(beta (z0 - r))) of another, as a mean over all examples. `apo_zero_unpaired` has z0 = 0.

    z0 is measured over the whole step, on every prompt with the answer of the next example, whatever ranks and
    micro-batches compute them. It moves no gradient, so neither do these answers. A step of one row, as the last of an
    epoch may be, has no other answer, and z0 = 0.
    """

    def __init__(self, settings: KtoSettings) -> None:
        _check(settings)
        self.settings = settings
        self.mismatches = settings.variant == "kto"

    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it is compared with."""
        return references.roles()

    def records(self) -> Mapping[str, Record]:
        """What the reference says of every answer; nothing where each step makes answers of its own besides."""
        return references.records("live" if self.mismatches else self.settings.reference)

    def parts(self) -> Sequence[str]:
        return ("prompt", "answer", "another row's answer, for the baseline")

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """The prompt and the answer behind it; the answer to mismatch joins them where a step is made."""
        if "label" not in row:
            cure = "set data.format=unpaired, or data.score= and data.threshold= to make labels of scores"
            raise lacking(row, "no label, which objective=kto wants", cure)
        label = row["label"]
        if not isinstance(label, bool | int) or label not in (0, 1):
            raise ValueError(f"has the label {label!r}, not true or false")
        segments = compared(row, tokenizer, self.settings, max_length, keys=("completion",))
        return Sample(segments, {"label": float(label)})

    def together(self, samples: Sequence[Sample], max_length: int) -> Sequence[Sample]:
        """Each with the next one's answer as a second one; the last with the first one's."""
        if not self.mismatches or len(samples) < 2:
            return samples
        following = [*samples[1:], samples[0]]
        return [_mismatched(*pair, max_length) for pair in zip(samples, following, strict=True)]

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The tokens before the answer."""
        return asked(row, tokenizer, self.settings)

    def fingerprint(self) -> str:
        """Digest of the settings that decide on tokens, and of the version of `sample`."""
        content = json.dumps(["kto", VERSION, self.settings.separator, self.settings.bos, self.settings.system])
        return hashlib.sha256(content.encode()).hexdigest()

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of examples."""
        return {"loss": float(len(batch.sample_numbers))}

    def statistics(self, roles: Roles, step: Step, world: World) -> Mapping[str, Any]:
        """z0 of the step, how many answers are wanted, and what the reference says, read once for all answers."""
        known = [(batch, references.said(roles, batch)) for batch in step] if self.mismatches else []
        ratio, others = 0.0, 0.0
        for batch, reference in known:
            found, count = self._log_ratios(roles, batch, reference)
            ratio, others = ratio + found, others + count
        wanted = sum(float(batch.columns["label"].sum()) for batch in step if len(batch.sample_numbers))
        examples = sum(len(batch.sample_numbers) for batch in step)
        ratio, others, wanted, total = world.sum([ratio, others, wanted, float(examples)])
        baseline = max(0.0, ratio / others) if others else 0.0
        return {"around": Around(baseline, (total - wanted, wanted), known)}

    def _log_ratios(self, roles: Roles, batch: Batch, reference: Tensor) -> tuple[float, int]:
        """The sum of log-ratios of mismatched answers, and how many there are."""
        import torch

        from loomtune.toolkit import log_probs
        from loomtune_plugins.objectives.kto_branch import branch

        others = batch.part == MISMATCHED
        with torch.no_grad():
            policy = log_probs(roles["policy"], branch(batch, MISMATCHED))
        return float((policy - reference[others[batch.row]]).double().sum()), int(others.sum())

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Summed over the examples."""
        import torch

        from loomtune.toolkit import entropy, observed, row_sums
        from loomtune_plugins.objectives.kto_branch import branch

        around: Around = statistics["around"]
        own = branch(batch, ANSWER) if self.mismatches else batch
        targets, *seen = observed(roles["policy"], own, [entropy] if self.settings.entropy else [])
        known = around.reference(batch)
        reference = references.said(roles, own) if known is None else known[(batch.part == ANSWER)[batch.row]]
        answers = batch.part == ANSWER
        policy, ratios = row_sums(targets, own)[answers], row_sums(targets - reference, own)[answers]
        wanted = batch.columns["label"] > 0.5 if len(answers) else policy > 0
        # 1 - sigmoid(x) = sigmoid(-x), which is exact where x is large.
        against = torch.where(wanted, 1.0, -1.0) * (around.baseline - ratios)
        counts = torch.where(wanted, self.settings.desirable, self.settings.undesirable)
        values = counts * torch.sigmoid(self.settings.beta * against)
        metrics = _metrics(policy.detach(), self.settings.beta * ratios.detach(), wanted, around)
        if seen:
            metrics["entropy"] = seen[0].detach().sum(), seen[0].new_tensor(float(len(seen[0])))
        return LossSums({"loss": values.sum()}, metrics)


def _mismatched(sample: Sample, other: Sample, max_length: int) -> Sample:
    """A sample with another's answer, cut to what room its own prompt leaves."""
    answer, room = other.segments[ANSWER], max(0, max_length - len(sample.segments[PROMPT].tokens))
    learned = answer.is_target[:room].copy()
    learned[:1] &= bool(len(sample.segments[PROMPT].tokens))
    foreign = Segment(answer.tokens[:room], learned, PROMPT)
    return replace(sample, segments=(*sample.segments, foreign))


def _metrics(log_probs: Tensor, rewards: Tensor, wanted: Tensor, around: Around) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over the wanted answers and over the others, and the difference of both means over the step."""
    count, (rejected, chosen) = rewards.new_tensor(float(len(rewards))), around.counts
    found = {}
    for name, which in (("chosen", wanted), ("rejected", ~wanted)):
        found[f"rewards/{name}"] = rewards[which].sum(), which.sum().float()
        found[f"logps/{name}"] = log_probs[which].sum(), which.sum().float()
    if chosen and rejected:
        margins = rewards[wanted].sum() / chosen - rewards[~wanted].sum() / rejected
        found["rewards/margins"] = margins, count / (chosen + rejected)
    else:
        found["rewards/margins"] = rewards.new_zeros(()), rewards.new_zeros(())
    return found | {"kl": (count * around.baseline, count)}


def _check(settings: KtoSettings) -> None:
    faults = [*unknown(settings, variant=VARIANTS, bos=BOS, reference=references.CHOICES), *too_small(settings)]
    if settings.variant == "kto" and settings.reference == "stored":
        what = "objective.reference=stored does not go with objective.variant=kto: which answer meets another prompt to"
        what += " measure z0 is decided in each step, so the reference has to be there"
        faults.append(Fault(what, "leave it out, or set objective.variant=apo_zero_unpaired"))
    for name in ("desirable", "undesirable"):
        if (value := getattr(settings, name)) < 0:
            faults.append(Fault(f"objective.{name}={value} is negative", f"set objective.{name} to 0 or more"))
    if settings.desirable == settings.undesirable == 0:
        what = "objective.desirable=0 and objective.undesirable=0 leave nothing to learn from"
        faults.append(Fault(what, "set one of them above 0"))
    refuse(faults)
