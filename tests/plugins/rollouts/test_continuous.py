"""What is particular to continuous batching: how much it does and keeps at once, and in which type."""

from pathlib import Path
from typing import Any

import pytest
import torch

from generating import completed, generate, prompts
from loomtune import api
from loomtune.errors import UserError
from loomtune_plugins.rollouts.continuous import Continuous
from loomtune_plugins.rollouts.settings import ContinuousSettings


@pytest.mark.parametrize(
    "settings", [{"tokens": 3, "batch": 3}, {"cache": 1}, {"cache": 70, "batch": 9}, {"tokens": 1}]
)
def test_no_setting_changes_a_completion(settings: dict[str, int], module: Any) -> None:
    asked = [*prompts(9), *[[3, 4, 5]] * 3]
    expected = completed("huggingface", module, asked, temperature=1.0, max_tokens=30)
    found = completed("continuous", module, asked, settings=settings, temperature=1.0, max_tokens=30)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=5e-5, rtol=5e-5)


def test_a_pass_has_no_more_rows_and_tokens_than_asked(module: Any) -> None:
    sizes: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _, given, named: sizes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    widest = []
    for settings in ({"batch": 2, "tokens": 64}, {"batch": 8, "tokens": 8}, {"batch": 8, "tokens": 64}):
        sizes.clear()
        generate("continuous", module, [[3, 4, 5]] * 16, settings=settings, temperature=2.0, max_tokens=30)
        widest.append(max(sizes))
    handle.remove()
    assert widest == [6, 8, 24]


def test_another_thread_computes_in_the_type_of_this_one(module: Any) -> None:
    asked = prompts(6)
    lower = completed("huggingface", module, asked, dtype=torch.bfloat16, max_tokens=1)
    found = completed("continuous", module, asked, dtype=torch.bfloat16, max_tokens=1)
    exact = completed("huggingface", module, asked, max_tokens=1)
    far = [abs(one.log_probs[0] - other.log_probs[0]) for one, other in zip(exact, found, strict=True)]
    near = [abs(one.log_probs[0] - other.log_probs[0]) for one, other in zip(lower, found, strict=True)]
    assert max(far) > 1e-3, "it computes in bf16"
    assert max(near) < 0.05


@pytest.mark.parametrize(("name", "value"), [("batch", 0), ("tokens", 0), ("cache", -1)])
def test_settings_that_mean_nothing_are_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"rollout\.{name}={value} is less than"):
        Continuous(ContinuousSettings(**{name: value}))


def test_what_pages_cannot_hold_is_refused(tied_model: Path, mixed_data: Path) -> None:
    settings = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single"]
    with pytest.raises(UserError, match="rollout=continuous"):
        api.check(api.compose([*settings, "adapter=prefix", "rollout=continuous"]))
    with pytest.raises(UserError, match="flex_attention cannot read"):
        api.check(api.compose([*settings, "model.attention=flex_attention", "rollout=continuous"]))
    api.check(api.compose([*settings, "adapter=lora", "rollout=continuous"]))
