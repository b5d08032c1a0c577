"""Settings of continued pretraining."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class PretrainSettings:
    """How documents begin."""

    bos: str = option("auto", "the beginning token: auto, as the tokenizer does; always; never")
