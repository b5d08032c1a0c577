"""Generation by transformers, in the training process or on ranks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Completion, Role, Sampling
from loomtune_plugins.rollouts.aside import Aside
from loomtune_plugins.rollouts.settings import HuggingFaceSettings, positive

if TYPE_CHECKING:
    from loomtune.world import World


class HuggingFace(Aside):
    """Continues prompts in batches of similar length, padded on the left, with a key-value cache.

    A row that has ended leaves its batch when enough others have, and a prompt that several rows share is read once.
    A sampled completion depends on the prompt's key and the position, never on the rank, the batch or its padding.
    """

    def __init__(self, settings: HuggingFaceSettings) -> None:
        super().__init__(settings.ranks, settings.ahead)
        positive("batch", settings.batch)
        self._batch = settings.batch

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """Completions of this rank's prompts, in order, without the prompt and with the stop token where one came."""
        assert role.adapter, "gathered weights have the adapter on"
        assert all(prompts), "a prompt needs a token to go on from"
        from loomtune_plugins.rollouts.generation import generate

        return generate(role, prompts, keys, sampling, world, self._batch)
