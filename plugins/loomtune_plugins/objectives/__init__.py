"""What is learned from rows. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from loomtune import hookimpl
from loomtune.contracts import Objective
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding, Plan
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.kto_settings import KtoSettings
from loomtune_plugins.objectives.online import checks
from loomtune_plugins.objectives.online.grpo_settings import GrpoSettings
from loomtune_plugins.objectives.online.online_dpo_settings import OnlineDpoSettings
from loomtune_plugins.objectives.online.ppo_settings import PpoSettings
from loomtune_plugins.objectives.online.rloo_settings import RlooSettings
from loomtune_plugins.objectives.pairs_settings import OrpoSettings, PairsSettings, SimpoSettings
from loomtune_plugins.objectives.pretrain_settings import PretrainSettings
from loomtune_plugins.objectives.reward_settings import RewardSettings
from loomtune_plugins.objectives.sft_settings import SftSettings

_ONLINE = {
    "num_generations": "group",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "epochs",
    "mask_truncated_completions": "mask_truncated",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
}
"""What TRL calls the settings of learning from completions."""


@hookimpl
def objectives() -> Sequence[Offer[Objective]]:
    """Offers the built-in objectives."""
    return (
        Offer(
            name="sft",
            build="loomtune_plugins.objectives.sft:Sft",
            schema=SftSettings,
            summary="supervised fine-tuning: the next token of answers, conversations or plain text",
            needs=frozenset({Trait.COMPLETIONS}),
        ),
        Offer(
            name="pretrain",
            build="loomtune_plugins.objectives.pretrain:Pretrain",
            schema=PretrainSettings,
            summary="continued pretraining: every token of plain text, in samples of at most max_length tokens",
            needs=frozenset({Trait.TEXTS}),
        ),
        Offer(
            name="distill",
            build="loomtune_plugins.objectives.distill:Distill",
            schema=DistillSettings,
            summary="learns a teacher's distribution of every next token: forward or reverse KL, or between (GKD)",
            needs=frozenset({Trait.COMPLETIONS}),
            aliases={"lmbda": "", "max_new_tokens": ""},
        ),
        Offer(
            name="reward",
            build="loomtune_plugins.objectives.reward:RewardModel",
            schema=RewardSettings,
            summary="a reward model: a scalar head that tells the better of two answers (Bradley-Terry)",
            needs=frozenset({Trait.PAIRS}),
            aliases={"center_rewards_coefficient": "center"},
        ),
        Offer(
            name="dpo",
            build="loomtune_plugins.objectives.dpo:Dpo",
            schema=DpoSettings,
            summary="prefers the better of two answers, measured against a frozen reference",
            needs=frozenset({Trait.PAIRS}),
            brings={"loss": ("sigmoid",)},
            aliases={
                "f_divergence_type": "divergence",
                "f_alpha_divergence_coef": "divergence_alpha",
                "ld_alpha": "tail",
                "use_weighting": "weighting",
            },
        ),
        Offer(
            name="kto",
            build="loomtune_plugins.objectives.kto:Kto",
            schema=KtoSettings,
            summary="makes wanted answers likelier and unwanted ones less likely than a frozen reference has them",
            needs=frozenset({Trait.LABELS}),
            aliases={"loss_type": "variant", "desirable_weight": "desirable", "undesirable_weight": "undesirable"},
        ),
        Offer(
            name="cpo",
            build="loomtune_plugins.objectives.unreferenced:Cpo",
            schema=PairsSettings,
            summary="prefers the better of two answers without a reference, beside its likelihood",
            needs=frozenset({Trait.PAIRS}),
            brings={"loss": ("sigmoid", "sft")},
            aliases={"cpo_alpha": "loss.sft.weight"},
        ),
        Offer(
            name="simpo",
            build="loomtune_plugins.objectives.unreferenced:Simpo",
            schema=SimpoSettings,
            summary="prefers the better of two answers by mean log-probabilities, without a reference",
            needs=frozenset({Trait.PAIRS}),
            brings={"loss": ("simpo",)},
        ),
        Offer(
            name="orpo",
            build="loomtune_plugins.objectives.unreferenced:Orpo",
            schema=OrpoSettings,
            summary="learns the chosen answers and the ratio of the odds of both, without a reference",
            needs=frozenset({Trait.PAIRS}),
            brings={"loss": ("sft", "odds_ratio")},
        ),
        Offer(
            name="grpo",
            build="loomtune_plugins.objectives.online.grpo:Grpo",
            schema=GrpoSettings,
            summary="learns from scored completions, each beside those of its prompt: GRPO, Dr.GRPO, DAPO, GSPO, CISPO",
            needs=frozenset({Trait.PROMPTS, Trait.GENERATION}),
            aliases={
                **_ONLINE,
                "loss_type": "variant",
                "delta": "clip_ceiling",
                "importance_sampling_level": "level",
                "scale_rewards": "scale",
                "use_bias_correction_kl": "kl_correction",
            },
        ),
        Offer(
            name="rloo",
            build="loomtune_plugins.objectives.online.rloo:Rloo",
            schema=RlooSettings,
            summary="learns from scored completions, each less the mean of the others of its prompt",
            needs=frozenset({Trait.PROMPTS, Trait.GENERATION}),
            aliases={**_ONLINE, "normalize_advantages": "normalize"},
        ),
        Offer(
            name="online_dpo",
            build="loomtune_plugins.objectives.online.online_dpo:OnlineDpo",
            schema=OnlineDpoSettings,
            summary="prefers the best of its own completions to the worst, as rewards have it, by the losses of pairs",
            needs=frozenset({Trait.PROMPTS, Trait.GENERATION}),
            brings={"loss": ("sigmoid",)},
            aliases={
                **{name: key for name, key in _ONLINE.items() if not key.startswith("clip")},
                "f_divergence_type": "divergence",
                "f_alpha_divergence_coef": "divergence_alpha",
                "ld_alpha": "tail",
                "use_weighting": "weighting",
            },
        ),
        Offer(
            name="ppo",
            build="loomtune_plugins.objectives.online.ppo:Ppo",
            schema=PpoSettings,
            summary="learns from scored completions, token by token, beside what a value function expected",
            needs=frozenset({Trait.PROMPTS, Trait.GENERATION}),
            aliases={
                "response_length": "max_new_tokens",
                "num_ppo_epochs": "epochs",
                "num_mini_batches": "minibatches",
                "cliprange": "clip_low",
                "cliprange_value": "value_clip",
                "vf_coef": "value_coef",
                "kl_coef": "beta",
                "kl_estimator": "kl",
            },
        ),
    )


@hookimpl
def preflight(plan: Plan, provided: Mapping[str, str]) -> Sequence[Finding]:
    """What objectives ask of other choices, and where they would do something else than their names say."""
    return [
        *_alone(plan, provided),
        *_values(plan, provided),
        *checks.findings(plan),
        *_references(plan),
        *_weights(plan),
    ]


def _alone(plan: Plan, provided: Mapping[str, str]) -> list[Finding]:
    """KTO measures each prompt with the answer of another row of its step; on-policy distillation writes answers."""
    chosen = next(iter(plan.choices("objective").values()), {})
    if chosen.get("name") == "distill" and chosen["on_policy"] and Trait.GENERATION not in provided:
        what = f"objective.on_policy={chosen['on_policy']} has the policy write answers, but no rollout is chosen"
        return [Finding(what, "set rollout=huggingface, or objective.on_policy=0")]
    if chosen.get("name") != "kto" or chosen["variant"] != "kto" or plan.root.batch.size > 1:
        return []
    what = f"objective=kto with batch.size={plan.root.batch.size} has no answer to another prompt to measure z0 on"
    return [Finding(what, "set batch.size to at least 2, or objective.variant=apo_zero_unpaired")]


def _values(plan: Plan, provided: Mapping[str, str]) -> Iterator[Finding]:
    """Roles that start from one base share it where an adapter can be switched off."""
    chosen = next(iter(plan.choices("objective").values()), {})
    if chosen.get("name") == "ppo" and chosen["value"] == "model" and (adapter := provided.get(Trait.ADAPTER_OFF)):
        what = f"objective.value=model asks for a network of its own, and with {adapter} all roles share one base"
        yield Finding(what, "set objective.value=head, or adapter=full")


def _references(plan: Plan) -> Iterator[Finding]:
    """An adapter's reference is the model with the adapter off, so also without what a saved one had learned."""
    objective = next(iter(plan.choices("objective")), "")
    adapter = next(iter(plan.choices("adapter").values()), {})
    compares = objective in ("dpo", "kto", "online_dpo") or (objective == "sft" and plan.choices("loss"))
    if adapter.get("path") and compares:
        what = f"objective={objective} compares with the model without its adapter, so not with what the saved adapter"
        what += f" of adapter.path={adapter['path']} makes of it, which is where training begins"
        beneath = f"adapter.under=[{adapter['path']}] instead, or " if "under" in adapter else ""
        cure = f"set {beneath}model.path to a model into which it is merged"
        yield Finding(what, cure, fatal=False)


def _weights(plan: Plan) -> Iterator[Finding]:
    """Of all losses, whoever made them. A weight of 0 is how one is watched without being learned."""
    for name, node in plan.choices("loss").items():
        weight = node.get("weight")
        if not isinstance(weight, int | float):
            continue
        if weight < 0:
            what = f"loss.{name}.weight={weight} would unlearn what the loss wants"
            yield Finding(what, f"set loss.{name}.weight above 0")
        elif weight == 0:
            what = f"loss.{name}.weight=0 learns nothing of it"
            yield Finding(what, f"leave {name} out of loss, unless its metrics are wanted", fatal=False)
