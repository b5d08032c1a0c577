"""Weights of safetensors files under the names that the module has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import WeightSource
from loomtune.contracts.sharding import Region
from loomtune.errors import UserError
from loomtune_plugins.models.growth import grow
from loomtune_plugins.models.headers import COMPUTED
from loomtune_plugins.models.pieces import Joined, OpenFile, Piece, Stacked, Stored, region

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SHOWN = 5


class StoredWeights(WeightSource):
    """The weights of a model's files.

    files: safetensors. module: the skeleton on the meta device, which says what names and shapes are wanted.
    heads: a file of scalar heads that were trained before, if there is one. vocabulary: rows of the stored embedding.
    Raises UserError where files and module do not agree.
    """

    def __init__(self, files: Sequence[Path], module: Any, heads: Path | None = None, vocabulary: int = 0) -> None:
        pieces = {name: Stored(file, name) for file in map(OpenFile, files) for name in file.handle.keys()}  # noqa: SIM118
        self._pieces = _renamed(pieces, module)
        self._aliases = _tie(self._pieces, module.all_tied_weights_keys)
        grow(self._pieces, module, vocabulary)
        _compare(self._pieces, self._aliases, module)
        if heads is not None:
            file = OpenFile(heads)
            self._pieces |= {name: Stored(file, name) for name in file.handle.keys()}  # noqa: SIM118

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor once: of tied names, the one that the others are tied to."""
        return {name: piece.shape for name, piece in self._pieces.items()}

    def read(self, name: str, where: Region | None = None) -> Tensor:
        """The tensor, or the slice of it, on the CPU in the stored type; a tied name reads what it is tied to."""
        piece = self._pieces[self._aliases.get(name, name)]
        return piece.read(region(where, piece.shape))


def _renamed(stored: Mapping[str, Stored], module: Any) -> dict[str, Piece]:
    """Pieces by the module's names, by the same mapping as `from_pretrained`: an old file's experts lie one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    wanted, prefix = module.state_dict(), module.base_model_prefix
    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, dict[str | None, list[Piece]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        found.setdefault(target, {}).setdefault(pattern, []).append(stored[name])
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    return {target: _converted(target, groups, by_pattern) for target, groups in found.items()}


def _converted(target: str, groups: Mapping[str | None, list[Piece]], by_pattern: Mapping[str, Any]) -> Piece:
    """One piece of what a converter makes of many; experts are stacked, then joined in the converter's order."""
    pattern = next(iter(groups))
    if pattern is None:
        return groups[None][0]
    converter = by_pattern[pattern]
    ordered = [groups[source] for source in converter.source_patterns if source in groups]
    steps = [(type(step).__name__, getattr(step, "dim", 0)) for step in converter.operations]
    match steps:
        case [("MergeModulelist", 0)] if len(ordered) == 1:
            return Stacked(ordered[0])
        case [("MergeModulelist", 0), ("Concatenate", dim)]:
            return Joined([Stacked(parts) for parts in ordered], dim)
        case [("Concatenate", dim)]:
            return Joined([part for parts in ordered for part in parts], dim)
    raise UserError.of(
        f"'{target}' is stored in an old layout that cannot be read in slices ({', '.join(name for name, _ in steps)})",
        "store it anew by `model.save_pretrained(FOLDER, save_original_format=False)`, and set model.path there",
    )


def _tie(pieces: dict[str, Piece], tied: Mapping[str, str]) -> dict[str, str]:
    """Leaves one name of each tied group. Raises UserError where a file holds two that differ."""
    for alias, name in tied.items():
        if alias in pieces and name in pieces and not _alike(pieces[alias], pieces[name]):
            raise UserError.of(
                f"'{alias}' and '{name}' are tied by the config and differ in the files",
                "set `tie_word_embeddings` to false in the model's config.json",
            )
        if alias in pieces:
            pieces.setdefault(name, pieces[alias])
            del pieces[alias]
    return dict(tied)


def _alike(one: Piece, other: Piece) -> bool:
    """Compares some rows; what was trained apart differs in every one."""
    if one.shape != other.shape:
        return False
    rows = {min(one.shape[0] - 1, number * one.shape[0] // 16) for number in range(17)}
    places = [region((slice(row, row + 1),), one.shape) for row in rows]
    return all(bool((one.read(place) == other.read(place)).all()) for place in places)


def _compare(pieces: dict[str, Piece], aliases: Mapping[str, str], module: Any) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in aliases}
    strange = [name for name in pieces if name not in wanted]
    for name in strange:
        if name.endswith(COMPUTED) or _ignored(name, module._keys_to_ignore_on_load_unexpected):
            del pieces[name]
    missing = [name for name in wanted if name not in pieces]
    unexpected = [name for name in pieces if name not in wanted]
    reshaped = [name for name in pieces if name in wanted and pieces[name].shape != wanted[name]]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    wrong = [f"{_few(names)} {what}" for what, names in groups if names]
    if wrong:
        raise UserError.of(
            f"the files are not the weights that config.json describes for {type(module).__name__}: {'; '.join(wrong)}",
            "set model.path to a folder whose config.json belongs to its weights",
        )


def _ignored(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
