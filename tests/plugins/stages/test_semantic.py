"""Rows that mean the same are found, all of them, and what must not differ does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loomtune.contracts import Row
from loomtune.errors import UserError
from loomtune.testing import check_stage
from loomtune_plugins.stages.semantic import Semantic
from loomtune_plugins.stages.settings import SemanticSettings
from planting import run
from support import byte_tokenizer, mixed_rows, shared

ROWS: list[dict[str, Any]] = [{**row, "origin": f"mixed:{place}"} for place, row in enumerate(mixed_rows(200))]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sentence-transformers with drawn weights: BERT of two layers, mean pooling."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling
    from transformers import BertConfig, BertModel

    folder = byte_tokenizer(tmp_path_factory.mktemp("bert"))
    shape = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = BertConfig(
            **shape, intermediate_size=64, max_position_embeddings=64, pad_token_id=0, initializer_range=0.5
        )
        BertModel(drawn).save_pretrained(folder)
    saved = tmp_path_factory.mktemp("sentences")
    parts = [Transformer(str(folder)), Pooling(32, pooling_mode="mean")]
    SentenceTransformer(modules=parts, device="cpu").save(str(saved))
    return saved


def stage(model: Path, **settings: Any) -> Semantic:
    made = Semantic(SemanticSettings(model=str(model), **settings))
    made.check()
    return made


def embedded(model: Path, texts: list[str], reads: int) -> Any:
    """One text at a time, without anything of ours: the mean of the last hidden states."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    vectors = []
    with torch.inference_mode():
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=reads, return_tensors="pt")["input_ids"]
            vectors.append(network(input_ids=tokens).last_hidden_state[0].mean(0).numpy())
    return np.stack(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute(model: Path, rows: list[dict[str, Any]], threshold: float, reads: int) -> list[str]:
    """Origins of what stays, where each row is compared with each: the cosine of prompts, and of answers."""
    sides = [embedded(model, [row[side] for row in rows], reads) for side in ("prompt", "completion")]
    alike = np.minimum(*(vectors @ vectors.T for vectors in sides))
    stay: list[int] = []
    for place in range(len(rows)):
        if not (alike[place, stay] >= threshold).any():
            stay.append(place)
    gap = np.abs(alike - threshold).min()
    assert gap > 1e-6, f"a pair lies at the threshold up to {gap:.1e}: choose another"
    return [rows[place]["origin"] for place in stay]


def origins(rows: list[Row]) -> list[str]:
    return [str(row["origin"]) for row in rows]


def test_what_a_model_of_sentences_finds_is_what_brute_force_finds(sentences: Path) -> None:
    kept, dropped = run(stage(sentences, threshold=0.97), ROWS)
    assert origins(kept) == brute(sentences, ROWS, 0.97, 64)
    assert 20 < len(dropped) < 180 and len(kept) + len(dropped) == len(ROWS)


def test_any_other_model_counts_by_the_mean_of_its_last_states(tiny_model: Path) -> None:
    kept, dropped = run(stage(tiny_model, threshold=0.99, batch=7), ROWS)
    assert origins(kept) == brute(tiny_model, ROWS, 0.99, 128)
    assert 20 < len(dropped) < 180


@pytest.mark.slow
def test_2000_rows_of_gsm8k_by_a_pretrained_model_equal_brute_force() -> None:
    with shared("data", "gsm8k", "train.jsonl").open() as lines:
        read = [json.loads(line) for line, _ in zip(lines, range(2000), strict=False)]
    rows = [{"prompt": row["question"], "completion": row["answer"], "origin": str(n)} for n, row in enumerate(read)]
    model = shared("models", "stories260k")
    kept, dropped = run(stage(model, threshold=0.99), rows)
    assert origins(kept) == brute(model, rows, 0.99, 512)
    assert len(kept) + len(dropped) == 2000 and len(dropped) > 100


def test_the_contract_is_kept_and_nothing_of_a_batch_leaks(sentences: Path) -> None:
    pair = {"prompt": "loom?", "chosen": "mool", "rejected": "loom", "origin": "p:1"}
    others = [
        {"prompt": "loom?", "origin": "p:2"},
        {"text": "warp and weft", "origin": "p:3"},
        {"text": "", "origin": "p:4"},
    ]
    check_stage(stage(sentences, threshold=0.97, batch=3), [*ROWS[:9], pair, *others])


def alike(made: Semantic, one: Row, other: Row) -> float:
    described = made.describe([one, other])
    table = made.table(described[:1], described[1:])[0, 0]
    found = float(made.alike(described[:1], described[1:])[0])
    assert found == pytest.approx(float(table), abs=1e-6)
    return found


def test_what_must_not_differ_makes_rows_unlike(sentences: Path) -> None:
    made = stage(sentences)
    row = {"prompt": "loom", "completion": "mool"}
    assert alike(made, row, {**row, "origin": "elsewhere"}) == pytest.approx(1)
    assert alike(made, {**row, "label": True}, {**row, "label": False}) == 0
    assert alike(made, row, {"prompt": "loom"}) == 0
    assert alike(made, row, {**row, "completion": "tfew prawprawpraw"}) < 0.999
    golden = stage(sentences, columns=["gold"])
    assert alike(golden, {**row, "gold": 1}, {**row, "gold": 2}) == 0
    assert alike(golden, {**row, "gold": 1}, {**row, "gold": 1}) == pytest.approx(1)
    pair = {"prompt": "loom", "chosen": "mool warp weft reed", "rejected": "mool warp weft heed"}
    assert alike(made, pair, {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}) == 0
    assert alike(made, pair, pair) == pytest.approx(1)


def test_a_side_is_read_up_to_a_length_that_is_told(sentences: Path) -> None:
    made = stage(sentences, max_length=8)
    assert made.versions()["tokens read"] == "8" and stage(sentences).versions()["tokens read"] == "64"
    assert alike(made, {"text": "warp and weft"}, {"text": "warp and reed"}) == pytest.approx(1)
    assert alike(stage(sentences), {"text": "warp and weft"}, {"text": "warp and reed"}) < 0.9999


def test_the_fingerprint_is_that_of_the_folder(sentences: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(sentences, tmp_path / "copied"))
    assert stage(copied).fingerprint() == stage(sentences).fingerprint()
    (copied / "1_Pooling" / "config.json").write_text("{}")
    assert Semantic(SemanticSettings(model=str(copied))).fingerprint() != stage(sentences).fingerprint()
    assert stage(sentences).memory() > 500 << 20


def test_a_model_that_was_not_made_for_sentences_needs_a_threshold(tiny_model: Path, sentences: Path) -> None:
    assert stage(sentences).threshold == 0.9
    with pytest.raises(UserError, match="was not made to compare sentences") as refused:
        stage(tiny_model)
    assert "stage.semantic.threshold=0.99" in refused.value.faults[0].cure


def test_a_folder_that_is_no_model_or_would_run_code_is_refused(sentences: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no model"):
        Semantic(SemanticSettings()).check()
    with pytest.raises(UserError, match="is no folder of a model"):
        stage(tmp_path)
    pickled = Path(shutil.copytree(sentences, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its weights are a pickle: pytorch_model\.bin"):
        stage(pickled)
    strange = Path(shutil.copytree(sentences, tmp_path / "strange"))
    (strange / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "custom.Module"}]))
    with pytest.raises(UserError, match=r"names code that is not of sentence-transformers: custom\.Module"):
        stage(strange)


@pytest.mark.parametrize("settings", [{"threshold": 1.5}, {"batch": 0}, {"limit": 0}, {"max_length": -1}])
def test_settings_without_sense_are_refused_with_the_key(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        Semantic(SemanticSettings(model="x", **settings))
    assert f"stage.semantic.{next(iter(settings))}" in refused.value.faults[0].cure
