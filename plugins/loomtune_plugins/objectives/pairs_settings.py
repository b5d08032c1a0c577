"""Settings of the objectives that learn from pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class PairsSettings:
    """What of a row is compared, and how much."""

    beta: float = option(0.1, "how strongly a preference counts")
    separator: str = option("", "text between prompt and answer, part of the prompt")
    bos: str = option("auto", "the beginning token: auto, as the tokenizer or the chat template does; always; never")
    numbers: list[str] = option([], "columns of numbers that losses read, such as margin")
