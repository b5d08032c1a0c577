"""How many operations a step's samples are worth, counted as the planner counts them (`planner/flops.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loomtune_plugins.planner.flops import EXPERTS, Shape, model_flops_per_token

if TYPE_CHECKING:
    from loomtune.contracts import Engine, Sample
    from loomtune.run import Run

CONVENTIONS = ("mfu", "mfu_palm")
_OF_CONFIG = ("num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim", "num_experts_per_tok", *EXPERTS)


@dataclass(frozen=True, slots=True)
class Passes:
    """A network that every sample of a step goes through. head: whether its `lm` head is read; learns: backward too."""

    shape: Shape
    head: bool
    learns: bool


@dataclass(frozen=True, slots=True)
class Amount:
    """Of a step's samples, all ranks' together, without padding. targets: the predicted tokens among them.

    squares: sum over tokens of twice what each sees, itself half: of a chain the square of its length. What answers to
    a prompt share counts once, though a rank may compute it for each.
    """

    tokens: int
    targets: int
    squares: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Amount:
        """Adds up samples."""
        targets = sum(sample.targets for sample in samples)
        return cls(sum(sample.length for sample in samples), targets, sum(map(_squares, samples)))


def _squares(sample: Sample) -> int:
    through: list[int] = []  # of each segment: its own tokens and its ancestors'
    total = 0
    for segment in sample.segments:
        above = through[segment.parent] if segment.parent >= 0 else 0
        through.append(above + len(segment.tokens))
        total += through[-1] ** 2 - above**2
    return total


def passes(run: Run) -> list[Passes]:
    """The networks of a step; none where a model does not say what it is made of.

    A frozen role goes forward in each step, but where a step learns from completions: they were read when they were
    made, and making them is counted nowhere.
    """
    trained = run.trained_engines()
    frozen = [] if run.objective.online() else [role.engine for role in run.roles.values() if not role.trained]
    shapes = {engine: _shape(engine) for engine in dict.fromkeys([*trained, *frozen])}
    found = [(shapes[engine], engine, number < len(trained)) for number, engine in enumerate([*trained, *frozen])]
    return [Passes(shape, "lm" in engine.spec.heads, learns) for shape, engine, learns in found if shape is not None]


def _shape(engine: Engine) -> Shape | None:
    spec, trained = engine.spec, engine.trained()
    config = _config(spec.model)
    if config is None:
        return None
    names = {name: spec.adapter.base_name(name) or name for name in trained}
    parameters = {**spec.model.weights(spec.seed).shapes(), **{names[name]: trained[name] for name in trained}}
    return Shape.of(parameters, set(names.values()), config)


def _config(model: Any) -> Mapping[str, Any] | None:
    """What transformers knows of the model, by its general names; None for a model that is none of its."""
    if not hasattr(model, "config"):
        return None
    config = model.config().get_text_config()
    known = {key: getattr(config, key, None) for key in _OF_CONFIG}
    return {key: value for key, value in known.items() if value is not None} if known["num_attention_heads"] else None


def operations(found: Sequence[Passes], amount: Amount, convention: str) -> float:
    """Of all ranks in the step."""
    tokens = max(1, amount.tokens)
    return tokens * sum(
        model_flops_per_token(
            one.shape,
            amount.squares / tokens,
            targets=amount.targets / tokens if one.head else 0.0,
            convention=convention,
            forward_only=not one.learns,
        )
        for one in found
    )
