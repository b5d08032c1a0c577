"""From what a user typed to a folder that holds a model; imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from loomtune.contracts.saved import INDEX, WHOLE
from loomtune.errors import UserError, near

TINY = Path(__file__).parent / "tiny"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")
NOT_DOWNLOADED = ("*/*", "consolidated*", "adapter_model*")
HASHED_WHOLE = 256 * 2**20


def resolve(path: str, checkpoint: str = "latest", revision: str = "", trusted: bool = False) -> Path:
    """The folder of a model. path: empty for the shipped model, a folder, a run's folder or checkpoint, or a hub id.

    Raises UserError where there is no such thing; a hub id is downloaded, or found in the cache.
    """
    return locate(path, checkpoint) or _download(path, revision, trusted)


def locate(path: str, checkpoint: str = "latest") -> Path | None:
    """The folder of a model on this machine; None for a hub id. Raises UserError where `resolve` would."""
    here = Path(path).expanduser() if path else TINY
    if here.is_dir():
        return _trained(here, checkpoint)
    # `runs/x` with a folder `runs` at hand is a misspelt folder, not somebody's repository.
    if HUB_ID.fullmatch(path) and not Path(path).parent.is_dir():
        return None
    raise UserError.of(f"there is no model folder '{here}'.{_nearest(here)}", "set model.path to a folder or a hub id")


def _trained(here: Path, checkpoint: str) -> Path:
    """The model inside a run's folder or checkpoint; any other folder is what it is."""
    if (here / "run.yaml").is_file():
        here = _committed(here, checkpoint)
    elif not (here / "manifest.json").is_file():
        return here
    if not (here / "model").is_dir() or not any((here / "model").glob("*.safetensors")):
        raise UserError.of(
            f"the checkpoint '{here}' holds {_held(here)}, not a whole model",
            "merge it with `loomtune export RUN`, and set model.path to the exported folder",
        )
    return here / "model"


def _committed(run: Path, checkpoint: str) -> Path:
    pointers = {"latest": "LATEST", "best": "BEST"}
    if checkpoint not in pointers:
        raise UserError.of(f"a run has no '{checkpoint}' checkpoint", "set model.checkpoint to latest or best")
    pointer = run / "checkpoints" / pointers[checkpoint]
    if not pointer.is_file():
        raise UserError.of(
            f"the run '{run}' has no {checkpoint} checkpoint",
            "finish it with `loomtune resume`, or set model.checkpoint to latest or best, or model.path elsewhere",
        )
    return run / "checkpoints" / pointer.read_text(encoding="utf-8").strip()


def _held(checkpoint: Path) -> str:
    return "only an adapter" if (checkpoint / "adapter").is_dir() else "no weights"


def _nearest(here: Path) -> str:
    if not here.parent.is_dir():
        return f" '{here.parent}' does not exist either."
    return near(here.name, (entry.name for entry in here.parent.iterdir() if entry.is_dir()))


def _download(name: str, revision: str, trusted: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*DOWNLOADED, "*.py"] if trusted else list(DOWNLOADED)
    try:
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=list(NOT_DOWNLOADED)
            )
        )
    except Exception as error:  # the hub's client raises errors of many libraries, all of them about reaching it
        raise UserError.of(
            f"'{name}' is no folder here, and the Hugging Face hub did not give it: {type(error).__name__}: {error}",
            "set model.path to a local folder, correct the id, or set HF_TOKEN for a gated model",
        ) from error


def read_config(place: Path) -> dict[str, Any]:
    """What `config.json` says. place: it, or its folder.

    Raises UserError where it is missing, is no JSON, is an adapter's, or describes quantised weights.
    """
    folder, file = (place.parent, place) if place.is_file() else (place, place / "config.json")
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        cure = (
            "merge the adapter into its base first"
            if adapter
            else "set model.path to a folder in Hugging Face's format"
        )
        raise UserError.of(f"'{folder}' holds {'an adapter' if adapter else 'no config.json'}, which is no model", cure)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError.of(f"'{file}' is not JSON: {error}", "mend or replace the file") from error
    if config.get("quantization_config"):
        raise UserError.of(f"the weights in '{folder}' are quantised", "set model.path to the unquantised model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Raises UserError where there are none; a pickle is never read."""
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    else:
        files = [folder / WHOLE]
    absent = [file.name for file in files if not file.is_file()]
    if absent and any(folder.glob("pytorch_model*.bin")):
        raise UserError.of(
            f"'{folder}' holds its weights as pickles, which can run any code and are never read",
            "convert it where you trust it: transformers' `AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)`",
        )
    if absent:
        raise UserError.of(
            f"'{folder}' lacks {', '.join(absent)}", "copy the weights there, or set model.path elsewhere"
        )
    return files


def digest(file: Path) -> str:
    """SHA-256 of a file; of its size, both ends and 64 samples between where reading all of it would take minutes."""
    blob = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):  # the hub's cache names files by their SHA-256
        return blob
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        sampled = hashlib.sha256(str(size).encode())
        for number in range(66):
            stream.seek((size - 2**20) * number // 65)
            sampled.update(stream.read(2**20))
    return sampled.hexdigest()
