"""Parameter groups: what decays, and at what rate it learns."""

from __future__ import annotations

import torch
from torch import nn

from loomtune.testing.toy import ToyAdapter
from loomtune_plugins.shardings.groups import parameter_groups


class Scaling(ToyAdapter):
    """LoRA+: one factor learns sixteen times as fast. asked: the names that it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def learning_rate_scale(self, name: str) -> float:
        self.asked.append(name)
        return 16.0 if "lora_B" in name else 1.0


def parameters(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def test_norms_and_biases_do_not_decay() -> None:
    given = parameters(embedding=(4, 3), bias=(3,), projection=(3, 3), norm=(3,), scale=())
    groups = {group.decays: list(group.parameters) for group in parameter_groups(given, ToyAdapter())}
    assert groups[True] == [given["embedding"], given["projection"]]
    assert groups[False] == [given["bias"], given["norm"], given["scale"]]


def test_a_factor_of_the_rate_makes_a_group_of_its_own() -> None:
    given = parameters(lora_A=(2, 3), lora_B=(3, 2), other=(3, 3))
    groups = parameter_groups(given, Scaling())
    found = [(group.decays, group.learning_rate_scale, len(group.parameters)) for group in groups]
    assert found == [(True, 1.0, 2), (True, 16.0, 1)]


def test_every_parameter_is_in_one_group_and_asked_for_by_its_own_name() -> None:
    given = {f"module.{name}": parameter for name, parameter in parameters(a=(2, 2), b=(2,)).items()}
    groups = parameter_groups(given, adapter := Scaling())
    assert sorted(id(p) for group in groups for p in group.parameters) == sorted(map(id, given.values()))
    assert adapter.asked == ["a", "b"]
