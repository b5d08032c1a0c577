"""Settings of several sources in one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from loomtune.settings import option
from loomtune_plugins.data.any_files_settings import AnyFileSettings


@dataclass
class SourceSettings(AnyFileSettings):
    """One source: its files, read as `data=files` reads them, and its share."""

    weight: Optional[float] = option(None, "its share of the rows that are visited, beside those of the others")  # noqa: UP045
    epochs: Optional[float] = option(None, "how often an epoch visits each of its rows; 1 where others say it")  # noqa: UP045


@dataclass
class MixSettings:
    """Which sources, and how often each is visited.

    Nothing said, an epoch visits every row once. Weights, epochs or a temperature say otherwise, one kind of them.
    """

    sources: dict[str, SourceSettings] = option({}, "the sources by names of your own: data.sources.NAME.path=, ...")
    temperature: Optional[float] = option(  # noqa: UP045
        None, "shares proportional to rows^(1/temperature): 1 as they are, larger ones more alike"
    )
