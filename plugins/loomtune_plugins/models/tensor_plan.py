"""How transformers' models are cut over tensor-parallel ranks: by the plan that comes with each family."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loomtune.errors import UserError

if TYPE_CHECKING:
    from torch import nn

KNOWN = frozenset(
    ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "replicated_with_grad_allreduce")
)
"""Styles whose maths is known here; those of experts and of compressed keys and values are not."""
ALONE = "set sharding.tensor=1"


def check(config: Any, ranks: int) -> None:
    """Raises UserError where layers of such a config cannot be cut over so many ranks, naming the nearest that can.

    Without torch.
    """
    text = config.get_text_config()
    plan: Mapping[str, str] = text.base_model_tp_plan or {}
    if not plan:
        raise UserError.of(f"transformers has no plan to cut the layers of {text.model_type} models over ranks", ALONE)
    if strange := sorted(set(plan.values()) - KNOWN):
        what = f"layers of {text.model_type} models are cut as {', '.join(strange)}, which is not known here"
        raise UserError.of(what, ALONE)
    _even(_sizes(text, plan), ranks)


def _sizes(text: Any, plan: Mapping[str, str]) -> dict[str, int]:
    """What has to be dealt out evenly; heads only where attention works on some of them."""
    sizes = {"intermediate_size": getattr(text, "intermediate_size", None)}
    if any(style == "colwise" and re.search(r"attn|attention", name) for name, style in plan.items()):
        heads = text.num_attention_heads
        sizes |= {"attention heads": heads, "key and value heads": getattr(text, "num_key_value_heads", None) or heads}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _even(sizes: Mapping[str, int], ranks: int) -> None:
    uneven = [f"{size} {name}" for name, size in sizes.items() if size % ranks]
    if uneven:
        most = math.gcd(*sizes.values())
        nearest = min((n for n in range(1, most + 1) if most % n == 0), key=lambda n: abs(n - ranks))
        raise UserError.of(
            f"{' and '.join(uneven)} cannot be dealt out to {ranks} ranks evenly", f"set sharding.tensor={nearest}"
        )


def resolve(module: Any, ranks: int) -> dict[str, str]:
    """Names of modules and how each is cut. Embedding and head stay whole where their rows do not divide."""
    from torch import nn

    check(module.config, ranks)
    found: dict[str, str] = {}
    names = {name for name, _ in module.named_modules()}
    for pattern, style in module.tp_plan.items():
        fits = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")).fullmatch
        found |= {name: style for name in names if fits(name)}
        if any(fits(name) for name, _ in module.named_parameters()):
            raise UserError.of(f"the plan cuts the bare parameters '{pattern}', which is not known here", ALONE)
    for name in _kept(module, found, ranks):
        found.pop(name, None)
    parts = {name: module.get_submodule(name) for name in found}
    linears = {name: part for name, part in parts.items() if isinstance(part, nn.Linear)}
    _even({name: _cut_size(part, found[name]) for name, part in linears.items()}, ranks)
    return {name: found[name] for name in parts}


def _cut_size(linear: nn.Linear, style: str) -> int:
    return linear.out_features if style.startswith("colwise") else linear.in_features


def _kept(module: Any, found: Mapping[str, str], ranks: int) -> list[str]:
    """Names of embedding and head, where they stay whole: what is tied is cut alike or not at all."""
    ends = module.get_input_embeddings(), module.get_output_embeddings()
    names = [name for name, part in module.named_modules(remove_duplicate=False) if any(part is end for end in ends)]
    divides = all(end.weight.shape[0] % ranks == 0 for end in ends)
    tied = ends[0].weight is ends[1].weight
    alike = {found.get(name) for name in names} == {"embedding_rowwise", "colwise_gather_output"}
    return [] if divides and (alike or not tied) else names
