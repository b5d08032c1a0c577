"""A model to generate from, and no pauses between short generations."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM
from transformers.generation.continuous_batching import continuous_api

from generating import drawn_llama


@pytest.fixture(scope="session")
def module() -> LlamaForCausalLM:
    return drawn_llama()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' manager collects garbage twice when it ends: more than a second where a test suite has some."""
    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(**{**vars(gc), "collect": lambda *_: 0}))
