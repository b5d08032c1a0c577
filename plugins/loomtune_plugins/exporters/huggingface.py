"""The format of Hugging Face: safetensors files with an index, config and tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Exporter, Trained
from loomtune.contracts.saved import HEADS, HEADS_FILE, INDEX, index_text, weight_files
from loomtune.errors import Fault, UserError
from loomtune_plugins.exporters.settings import HuggingFaceSettings

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"auto": "", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What may be set, in torch's words."""


class HuggingFace(Exporter):
    """What `AutoModelForCausalLM.from_pretrained` opens, and `model.path` of the next run."""

    def __init__(self, settings: HuggingFaceSettings) -> None:
        _check(settings)
        self._limit = int(settings.shard_gigabytes * 1e9)
        self._dtype, self.check = TYPES[settings.dtype], settings.check

    def export(self, trained: Trained, folder: Path) -> None:
        """Holds no more than one file's tensors, or one tensor that is larger than a file should be."""
        from safetensors.torch import save_file

        heads: dict[str, Tensor] = {}
        shards: list[list[str]] = []
        sizes: Counter[str] = Counter()
        for number, shard in enumerate(_shards(self._typed(trained, heads), self._limit)):
            save_file(shard, _draft(folder, number), metadata={"format": "pt"})
            shards.append(list(shard))
            sizes += _bytes(shard)
            shard.clear()  # before the next one is gathered
        _name(folder, shards, sizes.total())
        if heads:
            save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
        trained.model.save_config(folder, _main(sizes))
        trained.model.tokenizer().save(folder)

    def reopened(self, trained: Trained, folder: Path) -> Mapping[str, Any]:
        """As `model.path` takes it; code that came with the base is trusted as far as the run trusted it."""
        trusts = trained.chosen.get("trust_remote_code", False)
        return {"name": "huggingface", "path": str(folder), "trust_remote_code": trusts}

    def _typed(self, trained: Trained, heads: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All tensors, rounded once to the type in which they leave; but scalar heads are put aside as they are."""
        import torch

        for name, tensor in trained.merged():
            if name.startswith(HEADS):
                heads[name] = tensor.contiguous()
                continue
            wanted = getattr(torch, self._dtype) if self._dtype else trained.stored(name)
            rounds = wanted is not None and wanted.is_floating_point and tensor.is_floating_point()
            yield name, (tensor.to(wanted) if rounds else tensor).contiguous()


def _check(settings: HuggingFaceSettings) -> None:
    faults = []
    if settings.shard_gigabytes <= 0:
        what = f"exporter.huggingface.shard_gigabytes={settings.shard_gigabytes} holds nothing"
        faults.append(Fault(what, "set exporter.huggingface.shard_gigabytes to a number above 0"))
    if settings.dtype not in TYPES:
        what = f"exporter.huggingface.dtype={settings.dtype} is no type that weights leave in"
        faults.append(Fault(what, f"set exporter.huggingface.dtype to {', '.join(TYPES)}"))
    if faults:
        raise UserError(*faults)


def _bytes(shard: Mapping[str, Tensor]) -> Counter[str]:
    """How many there are of each type."""
    found: Counter[str] = Counter()
    for tensor in shard.values():
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return found


def _main(sizes: Counter[str]) -> str:
    """The floating type of most bytes: the one in which others load all of them."""
    return next((name for name, _ in sizes.most_common() if "float" in name), "float32")


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many together as `limit` bytes hold, at least one."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


def _name(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives the files the names that loaders look for, which say how many there are."""
    files = weight_files(len(shards))
    for number, file in enumerate(files):
        _draft(folder, number).rename(folder / file)
    if len(files) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(index_text(places, total), encoding="utf-8")


def _draft(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.part"
