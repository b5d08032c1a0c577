"""Settings of the rollout engines."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class HuggingFaceSettings:
    """Generation by transformers."""

    batch: int = option(64, "prompts that are continued at once on each rank: memory and time only")
