"""Settings of the rollout engines."""

from dataclasses import dataclass

from loomtune.errors import UserError
from loomtune.settings import option


@dataclass
class AsideSettings:
    """Where an engine generates that needs no server."""

    ranks: int = option(0, "so many of the processes, the last ones, train nothing and generate", how=True)
    ahead: int = option(0, "1: with `ranks`, the next batch is drawn while this one is trained on: one update older")


@dataclass
class HuggingFaceSettings(AsideSettings):
    """Generation by transformers."""

    batch: int = option(64, "prompts that are continued at once on each rank", how=True)


@dataclass
class ContinuousSettings(AsideSettings):
    """Generation by transformers' continuous batching. All of it is memory and time only."""

    batch: int = option(64, "prompts that each rank continues at once; a waiting one follows each that ends", how=True)
    tokens: int = option(
        512, "tokens of one pass: one of each prompt that is continued, the rest of those that follow", how=True
    )
    cache: int = option(
        0, "tokens whose keys and values are kept on each rank; 0: what `batch` of the longest may need", how=True
    )


def positive(name: str, value: int, least: int = 1) -> None:
    """Raises UserError for a setting below its least value."""
    if value < least:
        raise UserError.of(f"rollout.{name}={value} is less than {least}", f"set rollout.{name} to at least {least}")
