"""Names as users write them."""

from __future__ import annotations

import pytest

from loomtune.errors import UserError
from loomtune_plugins.adapters.full import Full
from loomtune_plugins.adapters.patterns import by_end, by_start, select
from loomtune_plugins.adapters.settings import FullSettings

LAYERS = [f"model.layers.{number}.mlp.{part}" for number in range(21) for part in ("up_proj", "down_proj")]


@pytest.mark.parametrize(
    "pattern,numbers",
    [
        ("layers.4-15.*", range(4, 16)),
        ("*.4-15.mlp.up_proj", range(4, 16)),
        ("layers.0-0.*", [0]),
        ("layers.1.*", [1]),
        ("layers.1*.*", [1, *range(10, 20)]),
        ("layers.[0-2].*", [0, 1, 2]),
        ("layers.18-99.mlp.down_proj", [18, 19, 20]),
    ],
)
def test_a_range_means_the_numbers_of_a_part(pattern: str, numbers) -> None:
    found = select("key", [pattern], LAYERS, by_end, "layer")
    assert sorted({int(name.split(".")[2]) for name in found}) == list(numbers)


def test_a_range_that_holds_nothing_is_refused() -> None:
    for pattern in ("layers.30-40.*", "layers.9-4.*", "4-15"):
        with pytest.raises(UserError, match="matches no layer"):
            select("key", [pattern], LAYERS, by_end, "layer")


def test_ends_and_beginnings_are_whole_parts() -> None:
    assert by_end("a.b.q_proj", "q_proj") and by_end("a.b.q_proj", "b.q_proj")
    assert not by_end("a.b.q_proj", "proj") and not by_end("a.b.q_proj", "a.b")
    assert by_start("a.b.weight", "a") and by_start("a.b.weight", "a.b")
    assert not by_start("a.b.weight", "a.bb") and not by_start("ab.weight", "a")


def test_a_range_of_layers_is_frozen(llama) -> None:
    module, _ = Full(FullSettings(freeze=["model.layers.0-0"])).weave(llama(), None, 0)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen and all(name.startswith("model.layers.0.") for name in frozen)
