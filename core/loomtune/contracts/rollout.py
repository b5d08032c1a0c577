"""Generation during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loomtune.contracts.role import Role
    from loomtune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens, and where to end.

    temperature: 0 is greedy. stop: token ids that end a completion, eos always included.
    max_tokens: of a completion. max_length: of prompt and completion together; 0: as many as the model was made for.
    """

    max_tokens: int
    max_length: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()


class Rollout(ABC):
    """Generates completions with the weights that are being trained."""

    @abstractmethod
    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], sampling: Sampling, world: World
    ) -> list[list[int]]:
        """Completions, without the prompt and with the stop token where one came, for this rank's prompts, in order.

        Every rank calls it, with no prompts where it has none; parameters are gathered once for the call. A prompt that
        leaves no room within `max_length` is completed by nothing.
        """
