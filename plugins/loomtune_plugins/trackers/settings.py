"""Settings of the trackers."""

from dataclasses import dataclass

from loomtune.settings import option

_SHOWN = "completions of a batch, the best and the worst of them, that are shown"
_EVERY = "steps at least between two batches of which completions are shown"


@dataclass
class JsonlSettings:
    """metrics.jsonl, and of completions that are learned from RUN/rollouts/step-<8 digits>.jsonl.

    At the defaults these take some 400 MB at most, and mostly a tenth of it.
    """

    rollouts: int = option(
        64,
        "completions of a batch that are kept, of its first prompts, texts up to 16,000 characters; 0: none; -1: all",
    )
    rollout_files: int = option(
        200, "batches whose completions are kept; beyond, every second goes, never the first and the newest; 0: all"
    )


@dataclass
class ConsoleSettings:
    """The terminal."""

    every: int = option(10, "steps between two lines where the output is no terminal")


@dataclass
class WandbSettings:
    """Weights & Biases. The API key is wandb's affair: `wandb login` or WANDB_API_KEY."""

    project: str = option("loomtune", "project that the run belongs to")
    entity: str = option("", "user or team; empty: wandb's default")
    group: str = option("", "group of runs that belong together")
    tags: list[str] = option([], "labels of the run")
    mode: str = option("", "`online`, `offline` or `disabled`; empty: WANDB_MODE, else offline where no key is known")
    rollouts: int = option(16, f"{_SHOWN} in a table; 0: none")
    rollout_every: int = option(10, _EVERY)


@dataclass
class TensorBoardSettings:
    """TensorBoard."""

    dir: str = option("", "folder of the event files; empty: RUN/tensorboard")
    rollouts: int = option(4, f"{_SHOWN} as text; 0: none")
    rollout_every: int = option(10, _EVERY)


@dataclass
class UsageSettings:
    """What a run uses."""


@dataclass
class ReportSettings:
    """report.html."""

    points: int = option(1000, "points drawn of a curve; longer runs are averaged over so many spans")
