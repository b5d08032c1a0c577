"""Prefix tuning by peft's encoder of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Model, WeightSource
from loomtune.errors import UserError, near
from loomtune_plugins.adapters.virtual.settings import PREFIX_INITS, PrefixSettings
from loomtune_plugins.adapters.virtual.virtual import Virtual, check_length, check_width

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.virtual.woven import Woven


class Prefix(Virtual):
    """Trains keys and values that every layer's attention sees before each sample's (Li and Liang 2021).

    Samples stand at the positions behind them, as in peft. All of a row sees the same prefix, which sees nothing.
    """

    def __init__(self, settings: PrefixSettings) -> None:
        super().__init__(settings.length)
        _check(settings)
        self._settings = settings

    def suits(self, model: Model) -> None:
        """Asks a skeleton on the meta device whether its attention can be shown a prefix."""
        import torch

        from loomtune_plugins.adapters.wrapped.woven import Nowhere

        super().suits(model)
        with torch.device("meta"):
            skeleton = model.skeleton()
        self.weave(skeleton, Nowhere(), 0)

    def config(self, **more: Any) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.virtual_tokens,
            prefix_projection=self._settings.projection,
            encoder_hidden_size=self._settings.width or None,
            **more,
        )

    def encoder(self, config: Any) -> nn.Module:
        from peft import PrefixEncoder

        return PrefixEncoder(config)  # type: ignore[no-any-return]

    def first(self, woven: Woven, part: str, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """As torch's layers begin; `zero`: the last layer, or all where there is one, gives zeros."""
        first = super().first(woven, part, shape, base, seed)
        last = [name for name, _ in woven.encoder.named_modules() if name][-1]
        return first.zero_() if self._settings.init == "zero" and part.startswith(f"{last}.") else first

    def prepare(self, woven: Woven) -> None:
        """Raises UserError where attention would not see the prefix from everywhere, or cannot be shown it."""
        from loomtune_plugins.adapters.virtual import prefix_cache

        prefix_cache.check(woven.base)

    def inputs(
        self, module: nn.Module, batch: Batch, attention: Callable[[Batch], Mapping[str, Any]]
    ) -> tuple[Batch, Mapping[str, Any]]:
        """The batch behind the prefix, and attention to both."""
        from loomtune_plugins.adapters.virtual import prefix_cache

        given = replace(batch, positions=batch.positions + self.virtual_tokens)
        made = module.made(batch.tokens.device)  # type: ignore[operator]
        pairs = prefix_cache.pairs(made, self._config, len(batch.tokens))
        seen = prefix_cache.widened(attention(given), self.virtual_tokens)
        return given, {**seen, "past_key_values": prefix_cache.held(pairs)}

    def lead(self, woven: Woven, call: dict[str, Any]) -> dict[str, Any]:
        """A call of the whole model: the first of some rows finds the prefix in its cache."""
        from loomtune_plugins.adapters.virtual import prefix_cache

        return prefix_cache.lead(self._config, woven, call)


def _check(settings: PrefixSettings) -> None:
    check_length(settings.length)
    check_width(settings.width)
    if settings.init not in PREFIX_INITS:
        raise UserError.of(
            f"adapter.init={settings.init} is unknown.{near(settings.init, PREFIX_INITS)}",
            f"set adapter.init to {' or '.join(PREFIX_INITS)}",
        )
    if settings.width and not settings.projection:
        raise UserError.of(
            f"adapter.width={settings.width} is the width of a network that is not there",
            "set adapter.projection=true, or leave adapter.width out",
        )
