"""Fixtures of all tests: a cache of their own, one thread a process, and worlds of processes that run many plans."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs.worlds import Worlds
from support import mixed_rows, tiny_llama, write_rows


def pytest_configure(config: pytest.Config) -> None:
    """Threads of torch and of tokenizers would fight over the cores with the ranks that tests start."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `slow` or `lab` where no `-m` asks for them, and says which belong on the same worker.

    Those that share processes, so that there is one set of these; the others file by file.
    """
    for item in items:
        shares = "worlds" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("worlds" if shares else item.nodeid.partition("::")[0]))
    if config.getoption("markexpr"):
        return
    left_out = {item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("lab")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenised samples of tests are not left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """Worlds of 1, 2, 3, ... processes, each started when a test first needs it."""
    worlds = Worlds(tmp_path_factory.mktemp("worlds"))
    yield worlds
    worlds.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and width 32, with a tokenizer of bytes."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the output head tied to the embeddings."""
    return tiny_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths."""
    return write_rows(tmp_path_factory.mktemp("rows") / "mixed.jsonl", mixed_rows(61))
