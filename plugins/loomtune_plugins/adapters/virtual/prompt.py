"""Prompt tuning by peft's embedding of virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loomtune.contracts import Model, WeightSource
from loomtune.errors import Fault, UserError, near
from loomtune_plugins.adapters.virtual.inputs import VirtualInputs
from loomtune_plugins.adapters.virtual.settings import INITS, PromptSettings
from loomtune_plugins.adapters.virtual.virtual import check_length

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.virtual.woven import Woven


class Prompt(VirtualInputs):
    """Trains the embeddings of virtual tokens before each sample (Lester et al. 2021, "The Power of Scale")."""

    def __init__(self, settings: PromptSettings) -> None:
        super().__init__(settings.length)
        _check(settings)
        self._settings = settings
        self._text: list[int] = []

    def suits(self, model: Model) -> None:
        super().suits(model)
        self.meet(model)
        if self._settings.init == "text" and not self._text:
            raise UserError.of(f"adapter.text='{self._settings.text}' has no token", "set adapter.text to a text")

    def meet(self, model: Model) -> None:
        """Reads the text's tokens, as the tokenizer encodes it, without a token that begins texts."""
        if self._settings.init == "text":
            self._text = model.tokenizer().encode(self._settings.text)

    def config(self, **more: Any) -> Any:
        from peft import PromptTuningConfig

        # However the values came about, they are in the file: peft would look for a tokenizer to make them anew.
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens, prompt_tuning_init="RANDOM", **more
        )

    def encoder(self, config: Any) -> nn.Module:
        from peft import PromptEmbedding

        return PromptEmbedding(config, None)  # type: ignore[no-any-return]

    def first(self, woven: Woven, part: str, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """Embeddings of real tokens; peft's normal values of deviation 1 are tens of times longer than most."""
        from loomtune_plugins.adapters.virtual import weights

        name, count = weights.embedding(woven.base, base), self.virtual_tokens
        if self._settings.init == "text":
            ids = [self._text[i % len(self._text)] for i in range(count)]
        else:
            ids = weights.tokens(base.shapes()[name][0], count, seed)
        real = weights.rows(base, name, ids)
        return weights.as_wide(real, seed) if self._settings.init == "random" else real


def _check(settings: PromptSettings) -> None:
    check_length(settings.length)
    if settings.init not in INITS:
        raise UserError.of(
            f"adapter.init={settings.init} is unknown.{near(settings.init, INITS)}",
            f"set adapter.init to {' or '.join(INITS)}",
        )
    if (settings.init == "text") != bool(settings.text):
        raise UserError(
            Fault(
                f"adapter.init={settings.init} with adapter.text='{settings.text}' do not belong together",
                "set adapter.init=text and adapter.text to what the virtual tokens are to begin with, or neither",
            )
        )
