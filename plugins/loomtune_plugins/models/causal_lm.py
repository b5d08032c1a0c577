"""What all models of this axis share: everything that follows from a transformers config and a tokenizer's folder."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Batch, Model
from loomtune.errors import UserError, near
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune.contracts.model import Exchange

ATTENTIONS = ("", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
LISTED = ("layer_types", "mlp_layer_types")
"""Values of a config that say something of each layer."""

CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


class CausalLM(Model):
    """A causal language model of transformers; where config, weights and tokenizer lie, the concrete ones say."""

    attention: str = ""
    chat_template: str = ""
    trusted: bool = False
    owns_tokenizer: bool = False
    new_tokens: Sequence[str] = ()
    pad_vocabulary_to: int = 1
    layers: int = 0

    @abstractmethod
    def described(self) -> Mapping[str, Any]:
        """The config as plain data; without torch."""

    @abstractmethod
    def published(self) -> Any:
        """The config as transformers makes it, before anything that settings change in it."""

    def config(self) -> Any:
        """The config with the rows that new tokens need."""
        config, rows = self.published(), self.vocabulary()
        if rows != self.stored_rows():
            config.get_text_config().vocab_size = rows
        return self.shortened(config)

    @abstractmethod
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie."""

    def check(self) -> None:
        """Checks what all of them have: the attention's name, the tokenizer and its chat template."""
        if self.attention not in ATTENTIONS and "/" not in self.attention:
            known = ", ".join(name for name in ATTENTIONS if name)
            hint = near(self.attention, ATTENTIONS)
            raise UserError.of(
                f"there is no attention '{self.attention}'.{hint}", f"set model.attention to one of {known}"
            )
        size, rows = self._tokenizer.size, self.stored_rows()
        # A published model may name a token without a row that it never uses (Gemma 3 1B does).
        if size > rows and not self.owns_tokenizer:
            raise UserError.of(
                f"the tokenizer in '{self.tokenizer_folder()}' has ids up to {size - 1}, the embedding {rows} rows",
                "set model.tokenizer to the tokenizer that belongs to the model",
            )

    @cached_property
    def _tokenizer(self) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(self.tokenizer_folder(), self.chat_template, self.trusted, self.new_tokens)

    def tokenizer(self) -> HuggingFaceTokenizer:
        """The tokenizer, made once."""
        return self._tokenizer

    def vocabulary(self) -> int:
        """Rows that hold every new token; those that are there and that no token uses are taken first."""
        rows = self.stored_rows()
        if self.new_tokens:
            rows = max(rows, 1 + max(self.tokenizer().new_ids.values()))
        return -(-rows // self.pad_vocabulary_to) * self.pad_vocabulary_to

    def grown(self) -> list[int]:
        """The rows, where they are others than were published: part of what the weights are."""
        return [rows] if (rows := self.vocabulary()) != self.stored_rows() else []

    def stored_rows(self) -> int:
        """Rows of the embedding as it was published; without torch."""
        return int(self._value("vocab_size"))

    def tied(self) -> bool:
        """Whether the head is the embedding; without torch."""
        return bool(self._value("tie_word_embeddings"))

    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return int(self._value(*CONTEXT))

    def _value(self, *names: str) -> Any:
        """A value of the config under the first name that it has; transformers knows the defaults of each type."""
        for source in (self.described, lambda: self.published().to_dict()):
            values = source()
            values = values.get("text_config") or values
            for name in names:
                if values.get(name) is not None:
                    return values[name]
        raise UserError.of(f"the model's config has no {names[0]}", f"add {names[0]} to the config")

    def exact(self) -> Model:
        """With the usual attention: flash attention computes neither in fp32 nor on a CPU."""
        other = copy(self)
        other.attention = ""
        return other

    def depth(self) -> tuple[int, int]:
        """The decoder's layers, and after how many of them their types begin anew."""
        count = int(self._value("num_hidden_layers", "n_layer", "num_layers"))
        config = self.described().get("text_config") or self.described()
        types = config.get("layer_types") or self.published().get_text_config().to_dict().get("layer_types")
        return count, period(types[:count]) if types else 1

    def of_depth(self, blocks: int) -> Model:
        """With so many of its first layers."""
        other = copy(self)
        other.layers = blocks
        return other

    def shortened(self, config: Any) -> Any:
        """A config with the layers that `of_depth` leaves of it."""
        if self.layers:
            text = config.get_text_config()
            text.num_hidden_layers = self.layers
            for name in LISTED:
                if isinstance(each := getattr(text, name, None), list):
                    setattr(text, name, each[: self.layers])
        return config

    def skeleton(self) -> nn.Module:
        """The module without weights, on the current device."""
        from loomtune_plugins.models import architecture, heads

        module = architecture.build(architecture.trainable(self.config()), self.attention, self.trusted)
        heads.head(module)  # an unknown formula is said at birth, not in the first step
        # `use_cache=False` keeps packed samples apart in training; generation asks for the cache again.
        module.generation_config.use_cache = True
        self._set_generation(module.generation_config)
        return module  # type: ignore[no-any-return]

    def _set_generation(self, settings: Any) -> None:
        settings.eos_token_id = self._stops(self._tokenizer.eos_id)
        settings.pad_token_id = self._tokenizer.pad_id

    def _stops(self, ends: int | list[int]) -> int | list[int]:
        """With which tokens servers stop: those known, and that with which the chat template ends a turn."""
        known, turn = ends if isinstance(ends, list) else [ends], self._tokenizer.turn_end
        return ends if turn is None or turn in known else [*known, turn]

    def ghost(self) -> Any:
        """A skeleton on the meta device, to read names and shapes from."""
        import torch

        with torch.device("meta"):
            return self.skeleton()

    def restore_buffers(self, module: nn.Module) -> None:
        """Makes rotary tables and the like anew, in place, as a normal construction would."""
        from loomtune_plugins.models import buffers

        buffers.restore(module)

    def hidden(
        self, module: nn.Module, batch: Batch, attention: Mapping[str, Any], extras: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Last hidden states `(rows, length, width)` after the final norm."""
        from loomtune_plugins.models import architecture, exchange

        model: Any = module
        exchanged = exchange.of(model)
        if exchanged is None:
            fitted = architecture.masks(model.config, batch.positions, attention)
        else:
            fitted = exchange.whole_masks(model, exchanged, batch, attention)
        output = model.get_decoder()(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            use_cache=False,  # with a cache, position_ids alone would not keep packed samples apart
            **fitted,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def check_sequence(self, ranks: int, tensor: int = 1) -> None:
        """By the attention, the kind of positions and the number of heads."""
        from loomtune_plugins.models import stretches

        heads = int(self._value("num_attention_heads", "n_head"))
        stretches.check(self.described(), self.attention, heads, ranks, tensor)

    def exchange_attention(self, module: nn.Module, exchange: Exchange | None) -> None:
        """Through transformers' registry of attention functions."""
        from loomtune_plugins.models.exchange import install

        super().exchange_attention(module, exchange)
        install(module, exchange)

    def check_tensor(self, ranks: int) -> None:
        """By the plan of the family, and the numbers of heads."""
        from loomtune_plugins.models import tensor_plan

        tensor_plan.check(self.config(), ranks)

    def tensor_plan(self, module: nn.Module, ranks: int) -> Mapping[str, str]:
        """The plan that transformers has for the family, with the names of this module."""
        from loomtune_plugins.models import tensor_plan

        return tensor_plan.resolve(module, ranks)

    def head(self, module: nn.Module) -> nn.Module:
        """From `(..., width)` to logits, with the scaling or capping that the family does."""
        from loomtune_plugins.models import heads

        return heads.head(module)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The decoder's layers, in order."""
        from loomtune_plugins.models import architecture

        return architecture.blocks(module)

    def save_config(self, folder: Path, dtype: str = "float32") -> None:
        """Writes `config.json` for weights under the module's names, and with which tokens generation ends."""
        config, module = self.config(), self.ghost()
        config.architectures = [type(module).__name__]
        config.dtype = dtype
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        module.generation_config.save_pretrained(folder)


def period(types: Sequence[str]) -> int:
    """After how many a sequence repeats itself, as often as it is long; all of it where it does not."""
    count = len(types)
    return next(n for n in range(1, count + 1) if all(types[i] == types[i % n] for i in range(count)))


def fingerprint(*parts: object) -> str:
    """Digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
