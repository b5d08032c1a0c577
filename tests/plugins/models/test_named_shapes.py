from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings

SHAPES = Path(__file__).parents[3] / "conf" / "loomtune_conf" / "model"
PUBLISHED = {
    "llama3_8b": 8.03e9,
    "llama3_70b": 70.55e9,
    "llama32_1b": 1.24e9,
    "qwen2_5_7b": 7.62e9,
    "qwen2_5_32b": 32.76e9,
    "qwen2_5_72b": 72.71e9,
    "qwen3_8b": 8.19e9,
    "mixtral_8x7b": 46.70e9,
    "llama_35m": 35.20e6,
    "llama_1m": 1.041e6,
}


def named(name: str, words: Path) -> Random:
    raw = OmegaConf.load(SHAPES / f"{name}.yaml")
    assert raw.pop("defaults") == ["random", "_self_"]
    settings = OmegaConf.merge(OmegaConf.structured(RandomSettings), raw, {"tokenizer": str(words)})
    return Random(OmegaConf.to_object(settings))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_shape_has_as_many_parameters_as_was_published(name, words):
    chosen = named(name, words)
    chosen.check()
    module = chosen.ghost()
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(PUBLISHED[name], rel=5e-3)
    assert chosen.context() == module.config.max_position_embeddings
    assert len(chosen.blocks(module)) == module.config.num_hidden_layers


def test_every_shape_that_is_shipped_is_counted():
    assert {file.stem for file in SHAPES.glob("*.yaml")} == set(PUBLISHED)
