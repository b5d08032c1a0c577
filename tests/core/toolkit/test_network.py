"""What runs inside an engine's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from loomtune.batching import collate
from loomtune.contracts import Batch, View, WeightSource
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit.dropout import SeededDropout
from loomtune.toolkit.network import Network, saved_name
from toys import sample


class TiedModel(toy.ToyModel):
    """The head's weight is the embedding's."""

    def skeleton(self) -> nn.Module:
        made = toy.Decoder()
        made.head.weight = made.tokens.weight
        return made


class DroppingModel(toy.ToyModel):
    def skeleton(self) -> nn.Module:
        made = toy.Decoder()
        made.blocks.append(nn.Dropout(0.5))
        return made


def network(*heads: str, model: toy.ToyModel | None = None, trained: bool = True) -> Network:
    return Network(toy.spec(model, trained=trained, heads=heads))


def frozen(of: Network) -> set[str]:
    return {name for name, parameter in of.named_parameters() if not parameter.requires_grad}


def batch(texts: Sequence[str]) -> Batch:
    return collate([sample(text) for text in texts], range(len(texts)), toy.ToyTokenizer.pad_id)


def test_a_head_that_nobody_reads_is_not_trained() -> None:
    assert frozen(network("score")) == {"module.head.weight"}
    assert frozen(network("lm")) == frozen(network("lm", "score")) == set()


def test_a_head_that_is_the_embedding_is_trained_as_such() -> None:
    assert frozen(network("score", model=TiedModel())) == set()


def test_nothing_of_a_frozen_role_is_trained() -> None:
    of = network("lm", "score", trained=False)
    assert frozen(of) == {name for name, _ in of.named_parameters()}


class Idle(toy.ToyAdapter):
    """Adds nothing and freezes what there is."""

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        return module.requires_grad_(False), weights


def test_a_role_that_would_learn_nothing_is_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match="Idle leaves nothing to train") as refused:
        Network(replace(toy.spec(), adapter=Idle()))
    assert "adapter=" in refused.value.faults[0].cure
    assert "heads.score.weight" not in frozen(Network(replace(toy.spec(heads=("score",)), adapter=Idle())))
    assert frozen(Network(replace(toy.spec(trained=False), adapter=Idle())))


def test_parameters_are_born_without_storage() -> None:
    assert {parameter.device.type for parameter in network("lm", "score").parameters()} == {"meta"}


def test_a_reader_sees_only_the_positions_that_predict_and_every_head() -> None:
    engine = toy.BareEngine(toy.spec(heads=("lm", "score")))
    texts = batch(["warp", "a"])

    def reader(view: View) -> torch.Tensor:
        assert set(view.heads) == {"lm", "score"} and view.index == slice(None)
        return view.heads["score"](view.states)

    assert texts.tokens.numel() == 10
    assert engine.forward(texts, reader).shape == (5, 1)


def test_what_predicts_is_the_hidden_state_before_the_target() -> None:
    engine = toy.BareEngine(toy.spec())
    whole = batch(["warp"])
    states = engine.forward(whole, lambda view: view.states)
    shorter = batch(["war"])
    torch.testing.assert_close(engine.forward(shorter, lambda view: view.states), states[:3])


def test_the_first_values_of_a_head_are_drawn_from_seed_and_name() -> None:
    of = network("lm", "score", "other")
    first = of.initial("heads.score.weight", None)
    assert torch.equal(first, of.initial("heads.score.weight", None))
    assert not torch.equal(first, of.initial("heads.other.weight", None))
    assert torch.equal(first[:, 2:5], of.initial("heads.score.weight", (slice(0, 1), slice(2, 5))))
    assert torch.equal(of.initial("module.tokens.weight", None), toy.Drawn(0).read("tokens.weight"))


def test_a_head_for_training_alone_begins_at_0() -> None:
    assert not network("_value").initial("heads._value.weight", None).any()


class Scoring(toy.Drawn):
    """Weights of a network whose scalar head was trained before."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**super().shapes(), "heads.reward.weight": (1, toy.WIDTH)}

    def read(self, name: str, where: tuple[slice, ...] | None = None) -> torch.Tensor:
        return torch.full((1, toy.WIDTH), 7.0) if name == "heads.reward.weight" else super().read(name, where)


class ScoringModel(toy.ToyModel):
    def weights(self, seed: int) -> WeightSource:
        return Scoring(seed)


def test_a_head_for_training_alone_begins_as_one_that_was_trained_and_others_are_drawn() -> None:
    of = network("_value", "other", model=ScoringModel())
    assert torch.equal(of.initial("heads._value.weight", None), torch.full((1, toy.WIDTH), 7.0))
    assert not (of.initial("heads.other.weight", None) == 7.0).any()


def test_dropout_belongs_to_the_data() -> None:
    kinds = [type(part) for part in network("lm", model=DroppingModel()).modules()]
    assert SeededDropout in kinds and nn.Dropout not in kinds


@pytest.mark.parametrize(
    ("name", "saved"), [("module.layers.0.weight", "layers.0.weight"), ("heads.score.weight", "heads.score.weight")]
)
def test_checkpoints_know_the_module_s_own_names(name: str, saved: str) -> None:
    assert saved_name(name) == saved


def test_precision_decides_the_type_of_activations() -> None:
    import dataclasses

    assert network("lm").compute_dtype == torch.float32
    assert Network(dataclasses.replace(toy.spec(), precision="bf16")).compute_dtype == torch.bfloat16
