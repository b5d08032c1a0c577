"""What a checkpoint takes: bytes by what they are, files' own words about them, and the time to write it.

Weights are written whole where other programs can load them, in fp32; what is trained lies beside them in the parts
that ranks hold, with the tensors that the optimizer declares (`docs/decisions/0003`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loomtune.catalogue import Catalogue
from loomtune.contracts import StateKind
from loomtune.offers import Trait
from loomtune.plan import Plan
from loomtune.settings import Hardware
from loomtune_plugins.planner import wire
from loomtune_plugins.planner.efficiency import HASHING
from loomtune_plugins.planner.trace import Collective, Trace

Range = tuple[float, float]

NUMBER = 4
"""Bytes of a number that is saved: everything trained is kept in fp32."""

BLOCK = 256
"""Numbers of an 8-bit moment that share a scale (Dettmers et al. 2022, section 2)."""

TENSORS = 12
"""Of a block of a usual decoder: nine of Llama's, with norms of heads or biases; so many make the manifest's length."""

ENTRY, PIECE, HEADER = 120, 110, 80
"""Characters of a tensor in the manifest, of each rank's part of it there, and in the header of the part's file."""

PAGEABLE = 2.4
"""How much longer a copy to memory that may be paged out takes (Harris 2012, How to Optimize Data Transfers in CUDA
C/C++, NVIDIA: 5.4 and 2.3 GB/s); checkpoints are copied to such."""

EXPORTED = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a number in an exported model; most bases are stored in 16 bits."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A checkpoint, in bytes.

    model: weights that other programs load, or those of an adapter. optimizer: what is trained and its state, in parts.
    words: manifest, headers, and what describes the model. files: tensors of its largest share, one rank's. exported: a
    model as the exporters write it. whole: whether `model` is all of the model.
    """

    model: int
    optimizer: int
    words: int
    files: int
    exported: int
    whole: bool

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.model + self.optimizer + self.words


def saving(trace: Trace, plan: Plan, catalogue: Catalogue) -> Saving:
    """What a checkpoint of such a run takes on disk."""
    everything, trained, _ = trace.parameters
    kinds: Mapping[str, StateKind] = plan.build(catalogue, "optimizer").state()
    adapter = catalogue.find("adapter", plan.chosen("adapter")["name"]).offer
    whole = Trait.WHOLE_MODEL in adapter.provides
    model = NUMBER * (everything if whole else trained)
    parts = sum(_state(kind, name, trained) for name, kind in kinds.items()) + (0 if whole else NUMBER * trained)
    tensors = (TENSORS if whole or trained == everything else 2 * 7) * max(1.0, trace.blocks)
    owners = min(trace.processes, 1 + parts // 2**20)  # smaller ones have no part of most tensors
    words = tensors * (1 + len(kinds)) * (ENTRY + owners * (PIECE + HEADER)) + (_described(plan) if whole else 0)
    exported = sum(_exported(choice, everything if "dtype" in choice else trained) for choice in _exporters(plan))
    share = -(-(model if whole else 0) // trace.processes) + -(-parts // trace.processes)
    return Saving(model, parts, round(words), share, exported, whole)


def seconds_to_write(saved: Saving, trace: Trace, hardware: Hardware) -> tuple[Range | None, Range]:
    """(until it is committed, as far as the disk's speed is known; while training waits), each a low and a high end.

    Training waits while whole weights are gathered, tensor by tensor, and shares are copied to the hosts. The rest is
    done beside it: files are hashed as they are written.
    """
    nodes = -(-trace.processes // hardware.per_node)
    link = hardware.host.gb_per_second * 1e9
    copied = saved.files / link if link else 0.0
    low, high = _gathered(saved, trace, hardware)
    waits = low + copied, high + PAGEABLE * copied
    if not hardware.disk_gb_per_second:
        return None, waits
    written = saved.bytes / (nodes * hardware.disk_gb_per_second * 1e9)
    quick, slow = (saved.files / (speed * 1e9) for speed in (HASHING[1], HASHING[0]))
    return (waits[0] + max(written, quick), waits[1] + written + slow), waits


def _gathered(saved: Saving, trace: Trace, hardware: Hardware) -> Range:
    """Seconds until every rank has seen every weight, where each holds a part of them."""
    groups = [one.ranks for one in trace.collectives if one.operation == "all_gather" and one.phase == "forward"]
    if not groups or not saved.whole:
        return 0.0, 0.0
    low, high = wire.seconds(
        Collective("all_gather", saved.model, max(groups, key=len), "checkpoint", "fp32"), hardware
    )
    return (low, high) if math.isfinite(high) else (0.0, 0.0)


def _state(kind: StateKind, name: str, trained: int) -> int:
    if kind is StateKind.LIKE:
        return NUMBER * trained
    if kind is StateKind.OPAQUE:
        return NUMBER * trained // BLOCK if name.startswith("absmax") else trained
    return 0


def _exporters(plan: Plan) -> list[Mapping[str, object]]:
    return list(plan.choices("exporter").values())


def _exported(choice: Mapping[str, object], numbers: int) -> int:
    return numbers * EXPORTED.get(str(choice.get("dtype", "fp32")), NUMBER)


def _described(plan: Plan) -> int:
    """Bytes of config and tokenizer, which lie beside the weights; of a hub's models most have nine millions."""
    path = Path(str(plan.chosen("model").get("path") or ""))
    names = ("tokenizer", "config", "generation_config", "vocab", "merges", "special_tokens")
    if str(path) != "." and path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file() and file.name.startswith(names))
    return 9_000_000 if plan.chosen("model").get("path") else 100_000
