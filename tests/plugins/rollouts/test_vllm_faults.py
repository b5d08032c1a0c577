"""Servers that are not there, not what they should be, or lost in the middle: said in time, with a cure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loomtune.errors import RunFailed, UserError
from loomtune_plugins.rollouts.vllm_settings import VllmSettings
from runs.worlds import free_port
from vllm_runs import PROMPTS, SAMPLING, alone, furthest, learn, policy, vllm
from vllm_server import FAILURES, Served, serving

KEYS = list(range(5))
COMPLETIONS = "/v1/completions"


@pytest.fixture
def served(tied_model: Path) -> Iterator[Served]:
    with serving(tied_model) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.rollouts.vllm_http.FIRST_PAUSE", 0.01)


def generate(served: Served, *, sampling: Any = SAMPLING, **settings: Any) -> Any:
    role = policy(served.path)
    return role, vllm(served.url, **settings).generate(role, PROMPTS, KEYS, sampling, alone())


@pytest.mark.parametrize("failure", [one for one in FAILURES if one != "empty"])
def test_what_happens_once_is_asked_again_and_changes_nothing(served: Served, failure: str) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    well = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    first = served.counts[COMPLETIONS]
    served.behave = lambda endpoint, number: (
        failure if endpoint == COMPLETIONS and number in (first, first + 2) else "well"
    )
    assert rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone()) == well
    assert served.counts[COMPLETIONS] == first + len(PROMPTS) + 2


@pytest.mark.parametrize("failure", ["500", "503", "disconnect", "half", "hang", "abort"])
def test_what_goes_on_ends_the_run_in_time_and_names_the_cure(served: Served, failure: str) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    rollout._settings.patience = 0.7  # from now on
    served.behave = lambda endpoint, number: failure if endpoint == COMPLETIONS else "well"
    with pytest.raises(RunFailed, match=r"(?s)127\.0\.0\.1.*cure: .*rollout\.patience"):
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())


def test_a_server_that_is_not_there_is_waited_for(tied_model: Path) -> None:
    port, came = free_port(), threading.Event()

    def start() -> None:
        time.sleep(0.3)
        with serving(tied_model, port=port):
            came.wait(20)

    threading.Thread(target=start, daemon=True).start()
    role = policy(tied_model)
    made = vllm(f"http://127.0.0.1:{port}").generate(role, PROMPTS, KEYS, SAMPLING, alone())
    came.set()
    assert furthest(role, PROMPTS, made) < 2e-5


def test_nobody_at_the_address_is_said_with_the_address(tied_model: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunFailed, match=rf"{url}/health.*Connection refused"):
        vllm(url, patience=0.3).generate(policy(tied_model), PROMPTS, KEYS, SAMPLING, alone())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"version": "0.21.3"}, r"is vLLM 0\.21\.3(.|\n)*install vllm>=0\.32"),
        ({"develops": False}, r"development mode(.|\n)*VLLM_SERVER_DEV_MODE=1"),
        ({"longest": 17}, r"takes 17 tokens(.|\n)*--max-model-len 18"),
        ({"logprobs": "raw"}, r"undivided logits(.|\n)*--logprobs-mode processed_logprobs"),
        ({"cap": 3}, r"after 3 of 6 tokens(.|\n)*--generation-config vllm"),
        ({"backend": "nccl"}, r"trains on none(.|\n)*rollout.push=disk"),
        ({"backend": "ipc"}, r"by ipc(.|\n)*rollout.push=disk"),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused_with_the_cure(
    tied_model: Path, how: dict[str, Any], said: str
) -> None:
    stops = replace(SAMPLING, temperature=0.7, stop=())
    with serving(tied_model, **how) as served, pytest.raises(UserError, match=said):
        generate(served, sampling=stops)


def test_another_model_is_refused_before_anything_is_pushed(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from support import SHAPE, byte_tokenizer

    for rows, said in ((250, "has no token 258"), (300, "more tokens than the 259")):
        other = tmp_path / str(rows)
        LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": rows})).save_pretrained(other)
        byte_tokenizer(other)
        with serving(other) as served:
            with pytest.raises(UserError, match=rf"{said}(.|\n)*model.path"):
                vllm(served.url).generate(policy(tiny_model), PROMPTS, KEYS, SAMPLING, alone())
            assert not served.counts["/collective_rpc"]


def test_another_tokenizer_is_refused(served: Served) -> None:
    served.tokenize = lambda body: {"tokens": [5, 6]}  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"makes other tokens(.|\n)*model.path"):
        generate(served)


def test_an_adapter_that_the_server_may_not_load_is_refused(tied_model: Path) -> None:
    said = r"(?s)does not load.*--enable-lora.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    with serving(tied_model, loras=False) as served, pytest.raises(UserError, match=said):
        vllm(served.url).generate(policy(tied_model, "lora"), PROMPTS, KEYS, SAMPLING, alone())


def test_an_adapter_does_not_go_on_top_of_another_runs_weights(served: Served) -> None:
    generate(served)
    with pytest.raises(UserError, match=r"other weights than its model's files(.|\n)*start it anew"):
        vllm(served.url).generate(policy(served.path, "lora"), PROMPTS, KEYS, SAMPLING, alone())


def test_adapters_need_no_development_mode(tied_model: Path) -> None:
    with serving(tied_model, develops=False) as served:
        role = policy(tied_model, "lora")
        learn(role)
        assert furthest(role, PROMPTS, vllm(served.url).generate(role, PROMPTS, KEYS, SAMPLING, alone())) < 2e-5


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_server_that_was_started_anew_gets_the_weights_again(served: Served, adapter: str) -> None:
    role, rollout = policy(served.path, adapter), vllm(served.url)
    learn(role)
    first = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    served.restart()
    assert rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone()) == first


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_weights_that_are_lost_in_the_middle_are_seen_and_all_is_asked_anew(served: Served, adapter: str) -> None:
    role, rollout = policy(served.path, adapter), vllm(served.url)
    learn(role)
    first = rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())
    last = served.counts[COMPLETIONS] + 2

    def behave(endpoint: str, number: int) -> str:
        if endpoint == COMPLETIONS and number == last:
            served.restart()
        return "well"

    served.behave = behave
    assert rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone()) == first


def test_a_server_with_other_weights_time_and_again_ends_the_run(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)

    def behave(endpoint: str, number: int) -> str:
        if endpoint == COMPLETIONS:
            served.weights = "another run's"
        return "well"

    served.behave = behave
    with pytest.raises(RunFailed, match=r"other weights(.|\n)*servers of its own"):
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())


def test_weights_of_an_earlier_update_are_not_asked_for_anew(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    end = rollout.begin(role, PROMPTS, KEYS, SAMPLING, alone())
    learn(role)
    served.restart()
    with pytest.raises(RunFailed, match="other weights"):
        end()


def test_spans_of_weight_versions_are_believed(served: Served) -> None:
    role, rollout = policy(served.path), vllm(served.url)
    plain = served._choices

    def spanned(body: Any) -> Any:
        told = plain(body)
        told["choices"][0]["weight_versions"] = [{"version": "other", "start": 0, "end": 1}]
        return told

    served._choices = spanned  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="generated with weights other"):
        rollout.generate(role, PROMPTS, KEYS, SAMPLING, alone())


def test_a_folder_that_cannot_be_written_is_told(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"rank 0: .*file"):
        generate(served, folder=str(tmp_path / "file" / "below"))


def test_servers_elsewhere_need_a_folder_that_they_see(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loomtune_plugins.rollouts.vllm_settings.HERE", ())
    with pytest.raises(UserError, match=r"must see it(.|\n)*set rollout.folder"):
        generate(served)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"urls": []}, "rollout.urls is empty"),
        ({"urls": ["host:8000"]}, "no address"),
        ({"push": "post"}, "no way for weights"),
        ({"folder": "here"}, "not the same folder"),
        ({"parallel": 0}, "rollout.parallel=0"),
        ({"patience": 0.0}, "rollout.patience=0"),
        ({"apart": -1.0}, "rollout.apart=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    from loomtune_plugins.rollouts.vllm import Vllm

    with pytest.raises(UserError, match=said):
        Vllm(VllmSettings(**settings))


def test_how_far_log_probabilities_may_be_apart_is_the_engines_own(served: Served) -> None:
    assert vllm(served.url, apart=0.02).apart == (0.02, 0.8)  # type: ignore[attr-defined]


def test_a_key_is_sent_along(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    generate(served)
    assert set(served.keys) == {"Bearer secret"}


def test_what_is_not_vllm_is_refused(served: Served) -> None:
    served.behave = lambda endpoint, number: "empty" if endpoint == COMPLETIONS and number > 4 else "well"
    with pytest.raises(UserError, match="without them"):
        generate(served)
