"""What generating in the training process takes: the policy whole, caches of keys and values, scores of a step.

The engine's own `gathered` is gone through, and in it two passes of the module: that of the longest prompts, and that
of the last token, when the caches are full. Between them they are lengthened by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from loomtune_plugins.planner.observing import Observer

if TYPE_CHECKING:
    from loomtune.run import Run

PAGE = {True: 256, False: 16}
"""Tokens of a page of `continuous`: with flash attention, and with any other."""

SCORES = {False: 4, True: 24}
"""Bytes of each score beside the module's own, greedy and drawn: a copy in fp32; divided by the temperature; the draws'
integers, and these shifted."""


def generated(observer: Observer, run: Run, rows: Sequence[Sequence[int]] = ()) -> Sequence[str]:
    """Lets the observer see the moments of a rollout, where one is made on this rank; gives notes.

    rows: words of the prompts; none: each is as long as leaves room for a completion.
    """
    if not run.objective.online() or run.rollout is None or run.rollout.ranks:
        return ()
    ((name, chosen),) = run.plan.choices("rollout").items()
    if name not in ("huggingface", "continuous"):
        return (f"what rollout={name} takes of this rank's memory is not counted",)
    count, prompt, room = _largest(run, rows, chosen["batch"])
    observer.phase, observer.counts, observer.cause = "rollout", 0.0, "gathered"
    observer.memory.at("rollout:start")
    with run.policy.engine.gathered() as whole, torch.no_grad():
        module: Any = whole
        if torch.is_autocast_enabled("cpu"):  # keeps what it makes of weights
            _passed(module, 1, 1)
        observer.cause = "rollout"
        drawn = run.plan.chosen("objective").get("temperature", 1.0) > 0
        if name == "continuous":
            page = PAGE["flash" in (module.config._attn_implementation or "")]
            pages = count * (-(-(prompt + room) // page) + 1)
            sizes = 1, max(chosen["tokens"], count), chosen["cache"] or pages * page
        else:
            sizes = count, 1, prompt + room - 1
        noted = _filled(observer, module, sizes, prompt, run.plan.chosen("objective").get("group", 1))
        _chosen(observer, module, count, drawn)
    observer.cause = "temporary"
    return noted


def _largest(run: Run, rows: Sequence[Sequence[int]], batch: int) -> tuple[int, int, int]:
    """(completions at once, tokens of the longest prompt among them, of a completion) of this rank's fullest batch."""
    settings, longest = run.plan.chosen("objective"), run.max_length
    wanted = int(settings.get("max_new_tokens", 0))
    prompts = [row[0] for row in rows] or [max(1, longest - wanted)]
    asked = [n for i in range(run.settings.batch.size) for n in [prompts[i % len(prompts)]] * settings.get("group", 1)]
    mine = sorted(asked[run.world.replica :: run.world.replicas] or asked[:1])
    batches = [mine[start : start + batch] for start in range(0, len(mine), batch)]
    made = [(len(one), one[-1], max(1, min(wanted, longest - one[-1]))) for one in batches]
    return max(made, key=lambda one: one[0] * (one[1] + one[2]))


def _filled(observer: Observer, module: Any, sizes: tuple[int, int, int], prompt: int, group: int) -> Sequence[str]:
    """The pass of the prompts, each of which is read once, and the last one. sizes: rows, their tokens, of a cache."""
    count, tokens, held = sizes
    observer.memory.at("rollout:prompts")
    cache = _passed(module, -(-count // group), prompt if tokens == 1 else 1)
    layers = [one for one in getattr(cache, "layers", ()) if getattr(one, "keys", None) is not None]
    for layer in layers:
        most = min(held, layer.sliding_window - 1) if layer.is_sliding else held
        for name in ("keys", "values"):
            _, heads, _, width = getattr(layer, name).shape
            setattr(layer, name, getattr(layer, name).new_empty(count, heads, most, width))
        if layer.is_sliding:
            layer.cumulative_length = held
    observer.memory.at("rollout")
    _passed(module, count, tokens, cache)
    return () if layers else ("caches of this model's generation are not counted",)


def _passed(module: Any, rows: int, tokens: int, cache: Any = None) -> Any:
    """The cache after a pass of so many tokens of each row."""
    given = torch.zeros(rows, tokens, dtype=torch.long)
    return module(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _chosen(observer: Observer, module: Any, rows: int, drawn: bool) -> None:
    """A step's scores are chosen from."""
    vocabulary = module.config.get_text_config().vocab_size
    observer.memory.within(rows * vocabulary * SCORES[drawn], "rollout")
