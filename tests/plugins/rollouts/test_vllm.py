"""Generation by vLLM's server: token ids there and back, with the weights of now, by every way that they can go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loomtune.errors import Preempted, UserError
from vllm_runs import PROMPTS, SAMPLING, STOP, alone, furthest, learn, policy, vllm
from vllm_server import Served, serving

KEYS = [11, 12, 13, 2**63 - 1, 15]
NEAR = 2e-5
"""Nats between two computations of a log-probability in fp32."""


@pytest.fixture
def served(tied_model: Path) -> Iterator[Served]:
    with serving(tied_model) as server:
        yield server


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_completions_come_of_the_weights_of_now_with_their_log_probabilities(served: Served, adapter: str) -> None:
    role, rollout = policy(served.path, adapter), vllm(served.url)
    first = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert furthest(role, PROMPTS, first) < NEAR
    learn(role)
    assert furthest(role, PROMPTS, first) > 0.01
    second = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert furthest(role, PROMPTS, second) < NEAR
    rollout.close()


def test_weights_are_pushed_once_for_each_update(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    for _ in range(3):
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert served.counts["/collective_rpc"] == 1
    learn(role)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert served.counts["/collective_rpc"] == 2


def test_what_lies_in_folders_is_taken_away(served: Served, tmp_path: Path) -> None:
    for adapter in ("lora", "full"):  # in this order: what `full` pushes stays
        role, rollout = policy(served.path, adapter), vllm(served.url, folder=str(tmp_path))
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
        learn(role)
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
        assert len(list(tmp_path.iterdir())) == (adapter == "lora")
        rollout.close()
        assert not list(tmp_path.iterdir()) and not served.adapters


def test_an_adapter_is_another_one_each_time_so_that_no_cache_of_the_last_is_used(served: Served) -> None:
    role, rollout = policy(served.path, "lora"), vllm(served.url)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    learn(role)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    names = [body["lora_name"] for body in served.asked["/v1/load_lora_adapter"]]
    paths = [body["lora_path"] for body in served.asked["/v1/load_lora_adapter"]]
    assert len(set(names)) == len(set(paths)) == 2 and list(served.adapters) == names[1:]
    assert {body["model"] for body in served.asked["/v1/completions"][-len(PROMPTS) :]} == {names[1]}


def test_an_adapter_that_vllm_does_not_serve_goes_merged_into_the_weights(served: Served) -> None:
    role = policy(served.path, "ia3")
    with pytest.raises(UserError, match=r"LoRA alone(.|\n)*rollout.push=disk"):
        vllm(served.url).generate(role, PROMPTS, KEYS, SAMPLING, alone())
    learn(role)
    made = vllm(served.url, push="disk").generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert furthest(role, PROMPTS, made) < 10 * NEAR


@pytest.mark.parametrize(("logprobs", "temperature"), [("raw", 1.0), ("processed", 0.7), ("raw", 0.0)])
def test_log_probabilities_are_of_logits_divided_by_the_temperature(
    served: Served, logprobs: str, temperature: float
) -> None:
    served.logprobs = logprobs
    role, sampling = policy(served.path), replace(SAMPLING, temperature=temperature)
    made = vllm(served.url).generate(role, PROMPTS, KEYS, sampling, alone())
    assert furthest(role, PROMPTS, made, temperature or 1.0) < NEAR


def test_log_probabilities_after_a_cut_are_not_taken_for_those_before_it(served: Served) -> None:
    role, cut = policy(served.path), replace(SAMPLING, top_k=3)
    assert not any(one.log_probs for one in vllm(served.url).generate(role, PROMPTS, KEYS, cut, alone()))
    served.logprobs = "raw"
    assert furthest(role, PROMPTS, vllm(served.url).generate(role, PROMPTS, KEYS, cut, alone())) < NEAR


def test_a_request_says_all_that_decides_so_that_no_default_of_a_server_does(served: Served) -> None:
    sampling = replace(SAMPLING, temperature=0.5, top_k=7, top_p=0.9, stop=(STOP, 5))
    vllm(served.url).generate(policy(served.path), [[70, 71], [72] * 61], [8, 9], sampling, alone())
    short, long = sorted(served.asked["/v1/completions"][-2:], key=lambda body: len(body["prompt"]))
    said = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "stop_token_ids": [STOP, 5], "ignore_eos": True, "n": 1}
    plain = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }
    assert short.items() >= (said | plain | {"prompt": [70, 71], "seed": 8, "max_tokens": 6, "logprobs": 0}).items()
    assert long["max_tokens"] == 3, "what does not fit in max_length is not asked for"


def test_a_prompt_without_room_is_completed_by_nothing(served: Served) -> None:
    prompts = [[70] * 64, [70, 71], [70] * 80]
    made = vllm(served.url).generate(policy(served.path), prompts, [1, 2, 3], SAMPLING, alone())
    assert [len(one.tokens) for one in made] == [0, 6, 0]


def test_completions_end_at_the_first_stop_token_which_stays(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    greedy = replace(SAMPLING, temperature=0.0)
    whole = list(rollout.generate(role, PROMPTS[:1], [1], greedy, alone())[0].tokens)
    ended = rollout.generate(role, PROMPTS[:1], [1], replace(greedy, stop=(whole[2],)), alone())[0]
    assert list(ended.tokens) == whole[: whole.index(whole[2]) + 1]


def test_keys_decide_and_nothing_else_of_ours(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    first = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    backwards = rollout.generate(role, PROMPTS[::-1], KEYS[::-1], SAMPLING, alone())
    assert [one.tokens for one in backwards[::-1]] == [one.tokens for one in first]
    assert first[0].tokens != first[1].tokens, "equal prompts, other keys"


def test_prompts_are_spread_over_servers_and_equal_ones_go_together(tied_model: Path) -> None:
    with serving(tied_model) as one, serving(tied_model) as other:
        role, rollout = policy(tied_model), vllm(one.url, other.url)
        made = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
        assert furthest(role, PROMPTS, made) < NEAR
        got = [
            [body["prompt"] for body in s.asked["/v1/completions"] if "return_token_ids" in body] for s in (one, other)
        ]
        assert len(got[0]) == 3 and got[0].count(PROMPTS[0]) == 2 and len(got[1]) == 2
        assert one.counts["/collective_rpc"] == other.counts["/collective_rpc"] == 1


def test_requests_are_under_way_together_and_training_goes_on_meanwhile(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url, parallel=4)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    held = threading.Event()
    served.behave = lambda endpoint, number: held.wait(10) and "well" if endpoint == "/v1/completions" else "well"
    end = rollout.begin(role, PROMPTS, KEYS, SAMPLING, alone())
    learn(role)  # a step, before anything was answered
    while served.here < 4:
        held.wait(0.01)
    assert not held.wait(0.1) and served.here == 4
    held.set()
    made = end()
    assert furthest(role, PROMPTS, made) > 0.01 and end() is made


def test_what_is_under_way_ends_before_more_is_begun_with_other_weights(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    end = rollout.begin(role, PROMPTS, KEYS, SAMPLING, alone())
    old = policy(served.path)
    learn(role)
    now = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    assert furthest(role, PROMPTS, now) < NEAR and furthest(old, PROMPTS, end()) < NEAR


def test_who_is_asked_to_leave_hangs_up_in_the_middle(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    served.behave = lambda endpoint, number: "hang" if endpoint == "/v1/completions" else "well"

    def leave() -> None:
        raise Preempted("asked to leave")

    end = rollout.begin(role, PROMPTS, KEYS, SAMPLING, alone())
    rollout.heed = leave
    with pytest.raises(Preempted):
        end()
