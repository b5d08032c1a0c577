"""Settings of generation by vLLM's server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from loomtune.errors import Fault
from loomtune.settings import option

PUSHES = ("auto", "adapter", "nccl", "disk")
HERE = ("localhost", "127.0.0.1", "::1")


@dataclass
class VllmSettings:
    """Servers that were started beside the run."""

    urls: list[str] = option(
        ["http://localhost:8000"], "addresses of `vllm serve`; prompts are spread over them", how=True
    )
    push: str = option(
        "auto",
        "how weights reach them: `adapter`, `nccl` or `disk`; `auto` by the adapter and what servers say",
        how=True,
    )
    folder: str = option(
        "", "folder that servers see under this name, for `adapter` and `disk`; a temporary one here", how=True
    )
    parallel: int = option(64, "requests that each rank has under way at once", how=True)
    patience: float = option(
        600.0, "seconds after which what a server does not answer has failed, its start included", how=True
    )
    apart: float = option(0.05, "largest mean difference of log-probabilities between servers and training, in nats")


def faults(settings: VllmSettings) -> Iterator[Fault]:
    """What is wrong with the settings."""
    if not settings.urls:
        yield Fault("rollout.urls is empty", "set rollout.urls=[http://HOST:8000] to where `vllm serve` listens")
    for url in settings.urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            yield Fault(f"rollout.urls names {url}, which is no address", "write it as http://HOST:8000")
    if settings.push not in PUSHES:
        yield Fault(f"rollout.push={settings.push} is no way for weights", f"set rollout.push to {', '.join(PUSHES)}")
    if settings.folder and not settings.folder.startswith("/"):
        what = f"rollout.folder={settings.folder} is not the same folder for a server, which began elsewhere"
        yield Fault(what, "set rollout.folder to a whole path")
    for key in ("parallel", "patience", "apart"):
        if (value := getattr(settings, key)) <= 0:
            yield Fault(f"rollout.{key}={value:g} is nothing", f"set rollout.{key} above 0")


def all_here(urls: list[str]) -> bool:
    """Whether every server is on this very machine."""
    return all(urlsplit(url).hostname in HERE for url in urls)
