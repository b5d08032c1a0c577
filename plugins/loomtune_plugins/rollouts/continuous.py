"""Generation by transformers' continuous batching, in the training process or on ranks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loomtune.contracts import Completion, Role, Sampling
from loomtune_plugins.rollouts.aside import Aside
from loomtune_plugins.rollouts.settings import ContinuousSettings, positive

if TYPE_CHECKING:
    from loomtune.world import World


class Continuous(Aside):
    """Puts a prompt in the place of each that has ended, and keeps keys and values in pages instead of padding them.

    What is drawn is what `huggingface` draws: it depends on the prompt's key and the position alone.
    """

    def __init__(self, settings: ContinuousSettings) -> None:
        super().__init__(settings.ranks, settings.ahead)
        positive("batch", settings.batch)
        positive("tokens", settings.tokens)
        positive("cache", settings.cache, least=0)
        self._settings = settings

    def generate(
        self, role: Role, prompts: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling, world: World
    ) -> list[Completion]:
        """Completions of this rank's prompts, in order, without the prompt and with the stop token where one came."""
        assert role.adapter, "gathered weights have the adapter on"
        assert all(prompts), "a prompt needs a token to go on from"
        from loomtune_plugins.rollouts.paged import generate

        return generate(role, prompts, keys, sampling, world, self._settings)
