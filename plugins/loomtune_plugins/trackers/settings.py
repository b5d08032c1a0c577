"""Settings of the trackers."""

from dataclasses import dataclass

from loomtune.settings import option


@dataclass
class JsonlSettings:
    """metrics.jsonl: nothing to set."""


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


@dataclass
class TensorBoardSettings:
    """TensorBoard."""

    dir: str = option("", "folder of the event files; empty: RUN/tensorboard")


@dataclass
class ReportSettings:
    """report.html."""

    points: int = option(1000, "points drawn of a curve; longer runs are averaged over so many spans")
