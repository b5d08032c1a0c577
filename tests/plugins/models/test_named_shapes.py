from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from loomtune_plugins.models.random import Random
from loomtune_plugins.models.settings import RandomSettings

SHAPES = Path(__file__).parents[3] / "conf" / "loomtune_conf" / "model"
PUBLISHED = {
    "llama3_8b": 8.03e9,
    "llama3_70b": 70.55e9,
    "llama31_8b": 8.03e9,
    "llama31_70b": 70.55e9,
    "llama32_1b": 1.24e9,
    "qwen2_5_7b": 7.62e9,
    "qwen2_5_32b": 32.76e9,
    "qwen2_5_72b": 72.71e9,
    "qwen3_8b": 8.19e9,
    "mixtral_8x7b": 46.70e9,
    "llama_35m": 35.20e6,
    "llama_1m": 1.041e6,
}


def values(name: str) -> DictConfig:
    raw = OmegaConf.load(SHAPES / f"{name}.yaml")
    base, own = raw.pop("defaults")
    assert own == "_self_"
    return raw if base == "random" else OmegaConf.merge(values(base), raw)


def named(name: str, words: Path) -> Random:
    settings = OmegaConf.merge(OmegaConf.structured(RandomSettings), values(name), {"tokenizer": str(words)})
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


def test_no_model_has_two_shapes():
    origins = [origin for name in PUBLISHED for origin in OmegaConf.load(SHAPES / f"{name}.yaml").get("origin", [])]
    assert len(origins) == len(set(origins)) > 8
