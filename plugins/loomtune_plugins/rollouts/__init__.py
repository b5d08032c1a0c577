"""Engines that generate completions during training."""

from collections.abc import Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Rollout
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.rollouts.settings import ContinuousSettings, HuggingFaceSettings
from loomtune_plugins.rollouts.vllm_settings import VllmSettings


@hookimpl
def rollouts() -> Sequence[Offer[Rollout]]:
    """Gives the built-in engines."""
    return (
        Offer(
            name="huggingface",
            build="loomtune_plugins.rollouts.huggingface:HuggingFace",
            schema=HuggingFaceSettings,
            summary="transformers' generate in the training process, with the weights gathered for the call",
            provides=frozenset({Trait.GENERATION}),
        ),
        Offer(
            name="continuous",
            build="loomtune_plugins.rollouts.continuous:Continuous",
            schema=ContinuousSettings,
            summary="transformers' continuous batching in the training process, with the weights gathered for the call",
            provides=frozenset({Trait.GENERATION}),
            excludes={Trait.VIRTUAL_TOKENS: "keeps none of the padding that its virtual tokens are put behind"},
        ),
        Offer(
            name="vllm",
            build="loomtune_plugins.rollouts.vllm:Vllm",
            schema=VllmSettings,
            summary="vLLM's own server, to which weights are pushed and which generates while training goes on",
            provides=frozenset({Trait.GENERATION}),
            excludes={
                Trait.VIRTUAL_TOKENS: "takes token ids, and what the adapter puts before each row has none",
                Trait.UNMERGEABLE: "serves the base or LoRA on it, and what the adapter learns is neither",
            },
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """Which attention continuous batching cannot page."""
    model = next(iter(plan.choices("model").values()), {})
    if "continuous" not in plan.choices("rollout") or model.get("attention") != "flex_attention":
        return []
    what = "rollout=continuous keeps keys and values in pages, which model.attention=flex_attention cannot read"
    return [Finding(what, "set rollout=huggingface, or model.attention to sdpa, eager or a flash attention")]
