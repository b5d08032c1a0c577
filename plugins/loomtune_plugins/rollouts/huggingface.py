"""Generation by transformers, in the training process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Completion, Role, Rollout, Sampling
from loomtune.errors import UserError
from loomtune_plugins.rollouts.settings import HuggingFaceSettings

if TYPE_CHECKING:
    from loomtune.world import World


class HuggingFace(Rollout):
    """Continues prompts in batches of similar length, padded on the left, with a key-value cache.

    A sampled completion depends on the prompt's key and the position, never on the rank, the batch or its padding.
    """

    def __init__(self, settings: HuggingFaceSettings) -> None:
        if settings.batch < 1:
            raise UserError.of(f"rollout.batch={settings.batch} is less than 1", "set rollout.batch to at least 1")
        self._batch = settings.batch

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """Completions of this rank's prompts, in order, without the prompt and with the stop token where one came."""
        assert role.adapter, "gathered weights have the adapter on"
        assert all(prompts), "a prompt needs a token to go on from"
        from loomtune_plugins.rollouts.generation import generate

        return generate(role, prompts, keys, sampling, world, self._batch)
