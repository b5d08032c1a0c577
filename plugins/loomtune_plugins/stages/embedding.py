"""Models that say by a vector what a text means."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loomtune.errors import UserError
from loomtune_plugins.stages.settings import SemanticSettings

OURS = "sentence_transformers."
LENGTH = 512
"""Tokens that a model reads of a text where its files do not say it."""

UNSAFE = (".bin", ".pt", ".pkl", ".pickle", ".ckpt")


def check(folder: Path) -> None:
    """Raises UserError where a folder holds no model that may be read: nothing in it may run code of its own."""
    if not (folder / "config.json").is_file() and not modules(folder):
        what = f"stage.semantic.model={folder} is no folder of a model"
        raise UserError.of(what, "set stage.semantic.model to one with config.json, or saved by sentence-transformers")
    if strange := [one for one in modules(folder) if not one.startswith(OURS)]:
        what = f"{folder}/modules.json names code that is not of sentence-transformers: {', '.join(strange)}"
        raise UserError.of(what, "choose another model")
    if modules(folder) and find_spec("sentence_transformers") is None:
        what = f"{folder} is a model of sentence-transformers, which is not installed"
        raise UserError.of(what, "pip install 'loomtune[semantic]'")
    weights = [path for path in _files(folder) if path.suffix in (*UNSAFE, ".safetensors")]
    unsafe = [path for path in weights if path.suffix in UNSAFE and not list(path.parent.glob("*.safetensors"))]
    if unsafe or not weights:
        told = f"its weights are a pickle: {unsafe[0].name}" if unsafe else "it has no weights"
        raise UserError.of(f"{folder} cannot be read: {told}", "save it as safetensors, or choose another model")


def modules(folder: Path) -> list[str]:
    """The parts that sentence-transformers made a model of; empty where it is none of theirs."""
    path = folder / "modules.json"
    return [str(part["type"]) for part in json.loads(path.read_text())] if path.is_file() else []


def reads(settings: SemanticSettings) -> int:
    """The most tokens of a text that the model looks at; the rest is cut off."""
    sentences, config, tokenizer = (
        json.loads(path.read_text()) if (path := Path(settings.model, name)).is_file() else {}
        for name in ("sentence_bert_config.json", "config.json", "tokenizer_config.json")
    )
    room = [config.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    return settings.max_length or sentences.get("max_seq_length") or int(min(filter(None, room), default=LENGTH))


def digest(folder: Path) -> str:
    """Of everything in a folder, and of how its files are called."""
    total = hashlib.sha256()
    for path in _files(folder):
        total.update(f"{path.relative_to(folder)}\n".encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def opened(settings: SemanticSettings) -> Embedder:
    """The model of a folder that `check` lets pass."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Sentences(settings) if modules(Path(settings.model)) else Words(settings)


def width(folder: Path) -> int:
    """Numbers of a vector, about: what the config says."""
    path = folder / "config.json"
    return int(json.loads(path.read_text()).get("hidden_size", LENGTH)) if path.is_file() else LENGTH


def weight(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(path.stat().st_size for path in _files(folder) if path.suffix == ".safetensors")


class Embedder(ABC):
    """A model that is loaded."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`(texts, dimensions)`."""

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same, each of length 1; on one thread, so that the number of processes changes nothing."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                found = self.encode([text.encode("utf-8", "replace").decode() for text in texts])
        finally:
            torch.set_num_threads(threads)
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return np.asarray(found / np.maximum(lengths, 1e-12), np.float32)


class Sentences(Embedder):
    """A model of sentence-transformers, with the pooling that it was trained for."""

    def __init__(self, settings: SemanticSettings) -> None:
        from sentence_transformers import SentenceTransformer

        safe = {"use_safetensors": True, "dtype": "float32"}
        self._model = SentenceTransformer(settings.model, device="cpu", local_files_only=True, model_kwargs=safe)
        self._model.max_seq_length = reads(settings)
        self._batch = settings.batch

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        found = self._model.encode(list(texts), batch_size=self._batch, show_progress_bar=False)
        return np.asarray(found, np.float32)


class Words(Embedder):
    """Any other model: the mean of its last hidden states over a text's tokens."""

    def __init__(self, settings: SemanticSettings) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder, safe = settings.model, {"local_files_only": True, "use_safetensors": True}
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, **safe).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._reads, self._batch = reads(settings), settings.batch

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._reads)["input_ids"]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))  # batches of like lengths: little padding
        found = np.zeros((len(rows), self._model.config.hidden_size), np.float32)
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            found[places] = self._mean([rows[place] for place in places])
        return found

    def _mean(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        states = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        summed = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return np.asarray(summed.numpy(), np.float32)
