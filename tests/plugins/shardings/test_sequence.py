"""Rows cut over ranks: what each computes, what they exchange, and how it comes together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from loomtune.batching import collate
from loomtune.contracts import Batch
from loomtune.contracts.batch import NO_SEGMENT
from loomtune.contracts.model import Exchange
from loomtune.errors import UserError
from loomtune.testing import toy
from loomtune.toolkit.dropout import batch_keys
from loomtune.toolkit.network import Network
from loomtune_plugins.shardings.sequence import Share, Ulysses
from loomtune_plugins.shardings.stretches import Stretched
from ranks import together
from toys import sample

ROWS, HEADS, STRETCH, WIDTH = 2, 4, 3, 5


def batch(*texts: str) -> Batch:
    return collate([sample(text) for text in texts], range(len(texts)), toy.ToyTokenizer.pad_id)


def share(whole: Batch, rank: int, size: int) -> Share:
    return Share.of(whole, cast(Ulysses, SimpleNamespace(rank=rank, size=size)))


@pytest.mark.parametrize("texts", [("warp", "a weft"), ("of a shuttle", "a", "loom"), (), ("a",)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_stretches_put_side_by_side_are_the_rows(texts: tuple[str, ...], size: int) -> None:
    whole = batch(*texts)
    shares = [share(whole, rank, size) for rank in range(size)]
    length = whole.tokens.shape[1]
    for name, filler in (("tokens", 0), ("positions", 0), ("segments", NO_SEGMENT)):
        laid = torch.cat([getattr(one.mine, name) for one in shares], 1)
        assert torch.equal(laid, getattr(shares[0].whole, name))
        assert torch.equal(laid[:, :length], getattr(whole, name)) and bool((laid[:, length:] == filler).all())
    assert len({one.mine.tokens.shape for one in shares}) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_a_target_belongs_to_the_rank_whose_stretch_predicts_it(size: int) -> None:
    whole = batch("of a shuttle", "a", "loom")
    shares = [share(whole, rank, size) for rank in range(size)]
    assert sorted(torch.cat([one.index for one in shares]).tolist()) == list(range(len(whole.target)))
    for one in shares:
        told = whole.tokens.flatten()[whole.predict_from][one.index]
        assert torch.equal(one.mine.tokens.flatten()[one.mine.predict_from], told)
        assert torch.equal(one.whole.tokens.flatten()[one.whole.predict_from][one.index], told)
        assert torch.equal(one.mine.target, whole.target[one.index])
        assert torch.equal(one.mine.row, whole.row[one.index])


def test_dropout_s_keys_of_a_stretch_are_those_of_the_row() -> None:
    whole = batch("of a shuttle", "loom")
    laid = torch.cat([batch_keys(share(whole, rank, 3).mine) for rank in range(3)], 1)
    real = whole.segments != NO_SEGMENT
    assert torch.equal(laid[:, : whole.tokens.shape[1]][real], batch_keys(whole)[real])


def exchanged() -> tuple[list[Any], ...]:
    """Both ways on one rank, and the gradient of a sum that weighs every entry."""
    exchange = Ulysses(dist.group.WORLD)
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(ROWS, HEADS, STRETCH * exchange.size, WIDTH, generator=draw)
    mine = slice(exchange.rank * STRETCH, (exchange.rank + 1) * STRETCH)
    stretch = whole[:, :, mine].clone().requires_grad_()
    heads, again = exchange.to_heads(stretch, 2 * stretch[:, :2])
    back = exchange.to_stretch(heads.transpose(1, 2))
    (heads.square().sum() + 3 * again.sum() + back.sum()).backward()
    return [part.tolist() for part in (heads, again, back, stretch.grad)], whole.tolist()


@pytest.mark.parametrize("size", [2])
def test_ranks_exchange_stretches_of_all_heads_for_whole_rows_of_some(size: int, tmp_path: Path) -> None:
    for rank, (given, whole) in enumerate(together(size, tmp_path, exchanged)):
        heads, again, back, gradient = (torch.tensor(part) for part in given)
        rows, each = torch.tensor(whole), HEADS // size
        mine = rows[:, :, rank * STRETCH : (rank + 1) * STRETCH]
        assert torch.equal(heads, rows[:, rank * each : (rank + 1) * each])
        assert torch.equal(again, 2 * rows[:, :2][:, rank * (2 // size) : (rank + 1) * (2 // size)])
        assert torch.equal(back, mine.transpose(1, 2))
        expected = 2 * mine + 1
        expected[:, :2] += 6
        torch.testing.assert_close(gradient, expected)


class InStretches(toy.ToyModel):
    """The toy, whose attention gathers the stretches of every rank: slow, and right for any exchange."""

    def check_sequence(self, ranks: int, tensor: int = 1) -> None:
        return

    def exchange_attention(self, module: Any, exchange: Exchange | None) -> None:
        module.exchange = exchange

    def hidden(self, module: Any, batch: Batch, attention: Any, extras: Any = None) -> Tensor:
        exchange: Exchange | None = module.exchange
        if exchange is None:
            return super().hidden(module, batch, attention, extras)
        here = slice(exchange.rank * batch.tokens.shape[1], (exchange.rank + 1) * batch.tokens.shape[1])
        tokens, positions = exchange.whole(batch.tokens), exchange.whole(batch.positions)
        hidden: Tensor = module(tokens, positions, attention["visible"])[:, here]
        return hidden


class Saying(InStretches):
    """Says something besides the hidden states."""

    def hidden(self, module: Any, batch: Batch, attention: Any, extras: Any = None) -> Tensor:
        extras["router_logits"] = torch.zeros(1)
        return super().hidden(module, batch, attention, extras)


TEXTS = [("of a shuttle", "a", "loom"), ("a",), ()]


def read(model: toy.ToyModel, texts: tuple[str, ...], sequence: Any, adapter: bool = True) -> dict[str, Any]:
    """A loss that needs every target at once, its gradients, and what a frozen read gives."""
    engine = toy.BareEngine(dataclasses.replace(toy.spec(model, heads=("lm", "score"))))
    spec = engine.network.spec
    network = Network(spec) if sequence is None else Stretched(spec, sequence)
    network.to_empty(device="cpu").load_state_dict(engine.network.state_dict())
    whole, seen = batch(*texts), []

    def reader(view: Any) -> dict[str, Tensor]:
        target = whole.target[view.index]
        seen.append(len(target))
        logits = view.heads["lm"](view.states)
        chosen = logits.log_softmax(-1)[torch.arange(len(target)), target]
        score = view.heads["score"](view.states)
        return {"chosen": chosen, "score": score, "right": logits.detach().argmax(-1) == target, "target": target}

    made = network(whole, reader, adapter)
    loss = (made["chosen"] * made["score"].squeeze(1).softmax(0)).sum() + made["chosen"].logsumexp(0).nan_to_num(
        neginf=0.0
    )
    loss.backward()
    with torch.no_grad():
        frozen = network(whole, reader, adapter)["chosen"]
    assert torch.equal(frozen, made["chosen"])
    return {
        "loss": loss.item(),
        "target": made["target"].tolist(),
        "right": made["right"].tolist(),
        "shown": seen[0],
        "gradients": {name: p.grad.tolist() for name, p in network.named_parameters()},
    }


def all_readings() -> list[dict[str, Any]]:
    return [read(InStretches(), texts, dist.group.WORLD) for texts in TEXTS]


def test_what_a_reader_makes_is_joined_and_its_gradients_add_up_over_ranks(tmp_path: Path) -> None:
    ranks = together(2, tmp_path, all_readings)
    for number, texts in enumerate(TEXTS):
        alone, both = read(toy.ToyModel(), texts, None), [rank[number] for rank in ranks]
        assert sum(one["shown"] for one in both) == alone["shown"]
        for one in both:
            assert one["loss"] == both[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            assert one["target"] == alone["target"] and one["right"] == alone["right"]
        for name, gradient in alone["gradients"].items():
            summed = sum(torch.tensor(one["gradients"][name]) for one in both)
            torch.testing.assert_close(summed, torch.tensor(gradient), rtol=1e-5, atol=1e-6)
    assert [rank[0]["shown"] for rank in ranks] != [ranks[0][0]["shown"]] * 2, "one rank predicts more than the other"


def detached() -> list[Any]:
    """A rank whose reader forgets the gradient where it is shown nothing."""
    network = Stretched(toy.spec(InStretches()), dist.group.WORLD)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.1)

    def reader(view: Any) -> Tensor:
        return view.states.sum(-1) if len(view.states) else torch.zeros(0)

    whole = batch("a")  # one target, which the first rank predicts
    made = network(whole, reader, True)
    made.sum().backward()
    return [made.tolist(), float(sum(p.grad.abs().sum() for n, p in network.named_parameters() if "blocks" in n))]


def test_a_rank_without_targets_takes_part_in_the_backward_pass(tmp_path: Path) -> None:
    (first, moved), (second, still) = together(2, tmp_path, detached)
    assert first == second and len(first) == 1
    assert moved > 0 and still == 0


def refused(what: str) -> str:
    try:
        network = Stretched(toy.spec(Saying() if what == "extras" else toy.ToyModel()), dist.group.WORLD)
        network.to_empty(device="cpu")
        reader: Callable[[Any], Any] = lambda view: view.states  # noqa: E731
        network(batch("a"), reader if what == "extras" else lambda view: view.states[:0], True)
    except (UserError, AssertionError) as error:
        return str(error)
    return ""


def test_a_model_that_says_more_than_hidden_states_is_refused(tmp_path: Path) -> None:
    for said in together(2, tmp_path, refused, "extras"):
        assert "router_logits cannot be put together" in said and "set sharding.sequence=1" in said


def test_a_model_that_does_not_know_its_attention_is_refused(tmp_path: Path) -> None:
    for said in together(2, tmp_path, refused, "attention"):
        assert "ToyModel does not say where its attention is" in said and "set sharding.sequence=1" in said
    toy.ToyModel().exchange_attention(toy.Decoder(), None)


def test_a_reader_that_drops_a_row_is_caught() -> None:
    one = share(batch("loom"), 0, 2)
    with pytest.raises(AssertionError, match="one row for each of the 3 targets"):
        one.join(torch.zeros(2), torch.zeros(3, 4))
