"""Reward models: a scalar head that gives the better of two answers the higher number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loomtune.contracts import Batch, LossSums, Objective, RoleSpec, Row, Sample, Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune.errors import Fault, near
from loomtune_plugins.objectives.answers import CHOSEN, PAIR, REJECTED, asked, compared, probability
from loomtune_plugins.objectives.encoding import BOS, columns, refuse, unknown
from loomtune_plugins.objectives.reward_settings import RewardSettings
from loomtune_plugins.scalar_scores import HEAD, scored_at_the_end, scores

VERSION = 4


class RewardModel(Objective):
    """Bradley and Terry 1952, as in Ouyang et al. 2022, equation 1: -log sigmoid(r_chosen - r_rejected - margin).

    Where a judge is unsure, the cross-entropy with its probability that the chosen answer is the better (Bai et al.
    2022, "Constitutional AI", section 4.1): -p log sigmoid(d) - (1 - p) log sigmoid(-d).

    The margin is that of Touvron et al. 2023, "Llama 2", equation 2. An answer's reward is read at its last token,
    wherever padding begins. Centring adds Eisenstein et al. 2023's coefficient * (r_chosen + r_rejected)^2, since a
    difference alone leaves the level of rewards open.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        faults = unknown(settings, bos=BOS)
        if settings.center < 0:
            what = f"objective.center={settings.center} is negative"
            faults.append(Fault(what, "set objective.center to 0 or more"))
        refuse(faults)

    def roles(self) -> Mapping[str, RoleSpec]:
        """One network, read by its scalar head."""
        return {"policy": RoleSpec(trained=True, head=HEAD)}

    def parts(self) -> Sequence[str]:
        return PAIR

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """The prompt and both answers; the place after an answer's last token is its only target."""
        prompt, *answers = compared(row, tokenizer, self.settings, max_length - 1)
        scored = [scored_at_the_end(answer, tokenizer.eos_id) for answer in answers]
        named = self.settings.probability
        doubted = {"probability": probability(row, named)} if named else {}
        return Sample((prompt, *scored), {"margin": self._margin(row), **doubted})

    def _margin(self, row: Row) -> float:
        if not self.settings.margin:
            return 0.0
        value = row.get(self.settings.margin)
        if isinstance(value, bool) or not isinstance(value, int | float):
            named = self.settings.margin
            told = f"it has {columns(row)}.{near(named, row)}"
            raise ValueError(f"has {value!r} as its {named}, which is no margin for objective.margin; {told}")
        return float(value)

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """The tokens before both answers."""
        return asked(row, tokenizer, self.settings)

    def fingerprint(self) -> str:
        """Digest of what decides on tokens and numbers."""
        content = json.dumps(["reward", VERSION, asdict(self.settings)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of pairs."""
        return {"loss": float((batch.part == CHOSEN).sum())}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """Summed over pairs."""
        from torch.nn import functional as F

        rewards = scores(roles["policy"], batch)
        chosen, rejected = (rewards[(batch.part == part)[batch.row]] for part in (CHOSEN, REJECTED))
        ahead = chosen - rejected - batch.columns["margin"]
        loss = -F.logsigmoid(ahead)
        if (right := batch.columns.get("probability")) is not None:
            loss = right * loss - (1 - right) * F.logsigmoid(-ahead)
        if self.settings.center:
            loss = loss + self.settings.center * (chosen + rejected).square()
        found = {
            "accuracy": (chosen > rejected).float(),
            "margin": (chosen - rejected).detach(),
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
        }
        count = chosen.new_tensor(float(len(chosen)))
        return LossSums({"loss": loss.sum()}, {name: (value.sum(), count) for name, value in found.items()})
