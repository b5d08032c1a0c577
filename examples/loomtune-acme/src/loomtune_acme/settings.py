"""Settings of acme's offers. They show in `loomtune plugins acme`, `--dry-run` and every message about a wrong key."""

from __future__ import annotations

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class FocalSettings:
    """The focal loss."""

    gamma: float = option(2.0, "how strongly tokens that the model knows are turned from; 0: not at all")


@dataclass
class CsvSettings:
    """metrics.csv."""

    separator: str = option(",", "what stands between two values")
