"""How what is trained is shown: few lines, whatever the model's depth."""

from __future__ import annotations

from loomtune_plugins.trackers.trained import MOST, Kind, kinds, lines

BLOCK = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.default.weight"


def test_layers_are_put_together_and_peft_s_wrapping_left_out() -> None:
    found = kinds({BLOCK.format(number): (16, 4096) for number in range(32)})
    assert found == [Kind("model.layers.{0..31}.self_attn.q_proj.lora_A", (16, 4096), 32)]
    assert found[0].size == 2_097_152


def test_gaps_single_layers_and_several_numbers_are_told() -> None:
    numbers = {(0, 3), (1, 3), (2, 3), (8, 3)}
    names = {f"layers.{layer}.experts.{expert}.up.weight": (4, 2) for layer, expert in sorted(numbers)}
    assert [kind.name for kind in kinds(names)] == ["layers.{0..2,8}.experts.3.up.weight"]


def test_layers_of_other_shapes_are_other_kinds() -> None:
    found = kinds({"layers.0.up.weight": (4, 2), "layers.1.up.weight": (8, 2), "layers.2.up.weight": (4, 2)})
    assert [(kind.name, kind.count) for kind in found] == [("layers.{0,2}.up.weight", 2), ("layers.1.up.weight", 1)]


def test_names_with_braces_are_shown_as_they_are() -> None:
    assert kinds({"odd.{}.{x}.0.weight": (2,)})[0].name == "odd.{}.{x}.0.weight"


def test_every_number_is_counted_and_columns_stand_below_each_other() -> None:
    model = {"model.embed.weight": (100, 10), "model.layers.0.up.weight": (10, 10)}
    head, *rest = lines({BLOCK.format(0): (2, 10), BLOCK.replace("lora_A", "lora_B").format(0): (10, 2)}, model)
    assert head == "trains 40 parameters, 3.636% of the 1,100 that the model has by itself"
    assert rest == [
        "  model.layers.0.self_attn.q_proj.lora_A  1 x (2, 10)  20",
        "  model.layers.0.self_attn.q_proj.lora_B  1 x (10, 2)  20",
    ]


def test_a_model_that_is_trained_whole_has_one_line() -> None:
    model = {"embed.weight": (10, 4), "norm.weight": (4,)}
    assert lines(model, model) == ["trains all 44 parameters of the model"]
    assert len(lines({"embed.weight": (10, 4)}, model)) == 2
    assert len(lines({"added.weight": (11, 4)}, model)) == 2


def test_of_many_kinds_the_smallest_are_added_up() -> None:
    trained = {f"part{'x' * size}.weight": (size,) for size in range(1, 31)}
    _, *rest = lines(trained, {"embed.weight": (10, 4)})
    assert len(rest) == MOST
    assert rest[0].split() == [f"part{'x' * 12}.weight", "1", "x", "(12,)", "12"]
    assert rest[-1].split() == ["11", "smaller", "kinds", "11", "x", str(sum(range(1, 12)))]
