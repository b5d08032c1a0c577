"""A server and several ranks: all gather, one pushes, each asks for its own, and none waits for one that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs.ranks import on_ranks
from vllm_ranks import failing, generating, leaving
from vllm_server import serving


@pytest.mark.parametrize(
    ("adapter", "sharding"), [("full", "fsdp"), pytest.param("lora", "ddp", marks=pytest.mark.slow)]
)
def test_two_ranks_get_what_one_gets(tied_model: Path, adapter: str, sharding: str) -> None:
    with serving(tied_model) as served:
        one = on_ranks(1, generating, served.url, tied_model, adapter, "single")[0]
        pushes = served.counts["/collective_rpc"] + served.counts["/v1/load_lora_adapter"]
        two = on_ranks(2, generating, served.url, tied_model, adapter, sharding)
        assert served.counts["/collective_rpc"] + served.counts["/v1/load_lora_adapter"] == 2 * pushes == 4
    for turn in range(2):
        whole = one[turn][0]
        assert [rank[turn][0] for rank in two] == [whole[0::2], whole[1::2]]
        assert max(rank[turn][1] for rank in (one, *two)) < 5e-5


def test_a_rank_that_loses_its_server_takes_the_others_along(tied_model: Path) -> None:
    with serving(tied_model) as served:
        first, second = on_ranks(2, failing, served.url, tied_model, 1)
    assert first == second and first.startswith("RunFailed: the rollout failed on rank 1: http://127.0.0.1:1/")


def test_ranks_leave_together_in_the_middle(tied_model: Path) -> None:
    with serving(tied_model) as served:
        met = 4  # questions by which a server is got to know
        served.behave = lambda endpoint, n: "hang" if endpoint == "/v1/completions" and n >= met else "well"
        assert on_ranks(2, leaving, served.url, tied_model) == ["asked to leave"] * 2
