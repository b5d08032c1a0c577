"""How many operations a step is worth, so that what is foretold and what is measured are counted alike.

Three conventions, none of which is "the" MFU; each is operations over seconds times the peak of all accelerators.

`mfu`: what the model asks for. Two operations for each parameter that a token's matmuls meet forward, four backward
    (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without its embedding): blocks for every token, the head for
    targets, since nothing else reaches it; a looked-up embedding none. Of experts those that a token is sent to.
    Attention over the causal half, as Dao et al. count it (FlashAttention-2, arXiv:2307.08691, section 4.1).
`mfu_palm`: 6N + 12 layers x width x length a token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): all N
    parameters, embedding and head for every token, attention over the whole square. What most published tables mean.
`hfu`: what was computed: recomputed blocks, and the scores that a flash kernel makes again in the backward pass.

A frozen parameter (LoRA's base) has no gradient of its own: 4 operations instead of 6 in each of them. Padding is worth
nothing in the first two. Windows narrower than a row are not known here: attention counts as if there were none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loomtune_plugins.planner.trace import Trace, Work

CONVENTIONS = ("mfu", "mfu_palm", "hfu")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how many operations a token takes.

    body, head: parameters of matmuls that a token meets in the blocks and in the head. trained_body, trained_head: of
    them, those with a gradient. total, trained: all that a token meets, embedding and vectors too. layers, width: of
    attention, all heads together.
    """

    body: int
    head: int
    trained_body: int
    trained_head: int
    total: int
    trained: int
    layers: int
    width: int

    @classmethod
    def of(
        cls, parameters: Mapping[str, Sequence[int]], trained: Collection[str] | None, config: Mapping[str, Any]
    ) -> Shape:
        """From names and whole shapes of parameters, each tied one once, and the values of a Hugging Face config.

        trained: names; None: all. Packed (quantised) weights must be given in the shape that they stand for.
        """
        met = {name: _met(name, shape, config) for name, shape in parameters.items()}
        embeddings = {name for name in met if _of(name, EMBEDDINGS)}
        matrices = {name for name, shape in parameters.items() if len(shape) > 1} - embeddings
        head = {name for name in matrices if _of(name, HEADS)} or embeddings  # tied: the head has no name of its own
        learns = set(met) if trained is None else set(trained)

        def count(names: set[str]) -> int:
            return sum(met[name] for name in names)

        body, heads = matrices - head, int(config["num_attention_heads"])
        return cls(
            body=count(body),
            head=count(head),
            trained_body=count(body & learns),
            trained_head=count(head & learns),
            total=count(set(met)),
            trained=count(set(met) & learns),
            layers=int(config["num_hidden_layers"]),
            width=heads * int(config.get("head_dim") or config["hidden_size"] // heads),
        )


def model_flops_per_token(
    shape: Shape, length: float, *, targets: float = 1.0, convention: str = "mfu", forward_only: bool = False
) -> float:
    """Operations that one token of a training step is worth, forward and backward.

    length: tokens of its row, see `mean_length`. targets: share of tokens that are predicted, for `mfu`'s head.
    convention: `mfu` or `mfu_palm`; what was really computed (`hfu`) no shape can tell. forward_only: of a frozen role.
    """
    assert convention in ("mfu", "mfu_palm"), convention
    if convention == "mfu":
        met, learns = shape.body + targets * shape.head, shape.trained_body + targets * shape.trained_head
        attention = 2 * shape.layers * shape.width * length
    else:
        met, learns = shape.total, shape.trained
        attention = 4 * shape.layers * shape.width * length
    return 2 * met + attention if forward_only else 4 * met + 2 * learns + 3 * attention


def mean_length(lengths: Iterable[int]) -> float:
    """The length of the row that a token finds itself in on average: attention grows by the square of a row's."""
    known = list(lengths)
    return sum(one * one for one in known) / max(1, sum(known))


def utilisation(flops: float, seconds: float, processes: int, peak: float) -> float:
    """Share of the peak. flops: of all processes in so many seconds; peak: of one, operations a second."""
    return flops / (seconds * processes * peak)


def step_flops(trace: Trace, shared: int = 1) -> dict[str, float]:
    """Operations of this rank's step by convention. shared: ranks that compute on the same rows (sequence, tensor)."""
    attention = [one for one in trace.work if one.kind == "attention"]
    matmuls = [one for one in trace.work if one.kind == "matmul"]
    everything, trained, active = trace.parameters
    learns = active if trained >= everything else min(trained, active)
    square = sum(_square(one) for one in attention if not one.again)
    return {
        "mfu": sum(one.flops * one.count for one in matmuls if not one.again)
        + sum(_square(one) * (0.5 if _causal(one) else 1.0) for one in attention if not one.again),
        "mfu_palm": (4 * active + 2 * learns) * trace.tokens / shared + square,
        "hfu": sum(one.flops * one.count for one in (*matmuls, *attention)),
    }


def _square(one: Work) -> float:
    """Of attention's two products over all pairs of positions; backward four, however the kernel gets at the scores."""
    heads, queries, keys, width, *_ = one.shape
    return (8.0 if one.phase == "backward" else 4.0) * heads * queries * keys * width * one.count


def _causal(one: Work) -> bool:
    """A language model's attention is, also under a mask of its own; one token after a cache sees all of it."""
    return one.shape[1] > 1 and one.shape[1] == one.shape[2]


def _of(name: str, modules: Collection[str]) -> bool:
    return any(part in modules for part in name.split("."))


def _met(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> int:
    """Of experts' weights the share that one token is sent through."""
    experts = next((int(config[key]) for key in EXPERTS if config.get(key)), 0)
    routed = experts and ".experts." in name
    return math.prod(shape) * int(config["num_experts_per_tok"]) // experts if routed else math.prod(shape)
