"""Architectures without a checkpoint: for pretraining from nothing, for measuring, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.errors import UserError
from loomtune_plugins.models import folders, new_tokens
from loomtune_plugins.models.causal_lm import CausalLM, fingerprint
from loomtune_plugins.models.settings import RandomSettings

if TYPE_CHECKING:
    from loomtune.contracts import WeightSource


class Random(CausalLM):
    """A model whose weights are drawn from the seed, the same for every world size and layout."""

    def __init__(self, settings: RandomSettings) -> None:
        self._settings = settings
        self.attention, self.chat_template = settings.attention, settings.chat_template
        self.new_tokens, self.pad_vocabulary_to = settings.new_tokens, settings.pad_vocabulary_to

    def check(self) -> None:
        """Checks that there is a shape, and that it and the tokenizer go together."""
        self.find()
        self.config()
        super().check()

    def find(self) -> None:
        """Reads the shape, and finds the tokenizer where it is no hub id."""
        if not self.described().get("model_type"):
            raise UserError.of(
                "no architecture is named for drawn weights",
                "choose a named shape such as model=llama_35m, or set model.config=FILE or model.shape.model_type",
            )
        new_tokens.check(self.new_tokens, self.pad_vocabulary_to)
        folders.locate(self._settings.tokenizer)

    def at_hand(self) -> bool:
        """True where the shape, and the tokenizer that it takes ids from, are no hub ids and no missing files."""
        try:
            self.find()
            return folders.locate(self._settings.tokenizer) is not None
        except UserError:
            return False

    @cached_property
    def _shape(self) -> dict[str, Any]:
        given = Path(self._settings.config).expanduser()
        base = folders.read_config(given) if self._settings.config else {}
        return {**base, **self._settings.shape}

    def described(self) -> Mapping[str, Any]:
        """The file's values, with those of `shape` over them."""
        return self._shape

    def published(self) -> Any:
        """The config; ids of special tokens come from the tokenizer where the shape does not say them."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        shape = dict(self._shape)
        ids = {"bos_token_id": self._tokenizer.bos_id, "eos_token_id": self._tokenizer.eos_id}
        try:
            return AutoConfig.for_model(shape.pop("model_type"), **{**ids, **shape})
        except (ValueError, TypeError, StrictDataclassError) as error:
            said = " ".join(str(error).split())
            raise UserError.of(f"the shape is none that transformers knows: {said}", "correct model.shape") from error

    def tokenizer_folder(self) -> Path:
        """The one that was set, else the config's where it has one, else the shipped model's."""
        if self._settings.tokenizer:
            return folders.resolve(self._settings.tokenizer)
        beside = Path(self._settings.config).expanduser()
        beside = beside.parent if beside.is_file() else beside
        return beside if self._settings.config and (beside / "tokenizer.json").is_file() else folders.TINY

    def fingerprint(self) -> str:
        """Digest of the shape; the seed is the run's."""
        return fingerprint("drawn", self._shape, *self.grown())

    def weights(self, seed: int) -> WeightSource:
        """Drawn anew for every read."""
        from loomtune_plugins.models.drawn import DrawnWeights

        return DrawnWeights(self.ghost(), seed)
