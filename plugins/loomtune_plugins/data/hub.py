"""Rows from data sets that the library `datasets` reads: saved on disk, or from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loomtune.errors import Fault, UserError
from loomtune_plugins.data.arrow import records
from loomtune_plugins.data.columns import ColumnFiles
from loomtune_plugins.data.hub_settings import HubSettings
from loomtune_plugins.data.limits import Limits
from loomtune_plugins.data.reader import WHOLE, Numbered, Reader
from loomtune_plugins.data.scan import PIECE, scan

_BATCH = 100

_UNREAD = "check data.path, data.config, data.revision and the names of splits; the hub needs a network"

_UNREACHED = (
    "check data.path and the network: the hub needs a network. Without one, name a folder that save_to_disk made, or "
    "set HF_HUB_OFFLINE=1, with which what was fetched before is read at once"
)


class Hub(ColumnFiles):
    """Splits of one data set. Code that comes with a data set is never run: the library has ceased to."""

    def __init__(self, settings: HubSettings) -> None:
        patterns = {"train": settings.train, "validation": settings.validation, "test": settings.test}
        reader = Splits(Limits.of(settings), settings.path, settings.config, settings.revision)
        super().__init__(settings, reader, "mend these rows, or choose a split without them", patterns)


@dataclass(frozen=True)
class Splits(Reader):
    """Takes a split for a file: its path is the data set's with the split's name after it. A part is some rows."""

    limits: Limits
    source: str
    config: str
    revision: str

    def find(self, patterns: str) -> list[Path]:
        """One split."""
        return [Path(self.source, patterns)]

    def absences(self, name: str, patterns: str) -> Iterator[Fault]:
        """A file, or a path that leads nowhere and is no name on the hub either; told once, of `path`."""
        source = Path(self.source).expanduser()
        if name != "path" or source.is_dir():
            return
        if source.is_file():
            yield Fault(f"data.path={self.source} is a file", "set data=files, or name a folder")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source):
            yield Fault(
                f"data.path={self.source} is neither a folder nor a name on the hub", "set data.path=owner/name"
            )

    def glimpse(self, path: Path) -> Iterator[Numbered]:
        """Without all of it being fetched."""
        if _is_saved(self.source):
            return self.records(path)
        return self._streamed(path)

    def parts(self, path: Path) -> Sequence[Mapping[str, Any]]:
        with _readable(path):
            found = self._loaded(path.name)
            rows, size = len(found), found.data.nbytes
        each = max(1, rows * PIECE // max(size, 1))
        return [{"start": start, "stop": min(start + each, rows)} for start in range(0, rows, each)]

    def records(self, path: Path, part: Mapping[str, Any] = WHOLE) -> Iterator[Numbered]:
        """Rows numbered from 1. Raises UserError where there is no such split."""
        with _readable(path):
            found = self._loaded(path.name)
            chosen = found.select(range(part["start"], part["stop"])) if part else found
            yield from enumerate(self._rows(chosen), start=part.get("start", 0) + 1)

    def digest(self, path: Path) -> str:
        """Of the files under the split, and of which rows of theirs it has."""
        with _readable(path):
            found = self._loaded(path.name)
            files = [scan(Path(one["filename"])).digest for one in found.cache_files]
            told = [path.name, len(found), files or found._fingerprint]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def stream(self, path: Path) -> Iterator[Numbered]:
        """From the hub as they come. Raises UserError where that is no whole split of a known state."""
        if _is_saved(self.source) or Path(self.source).expanduser().is_dir():
            return self.records(path)
        self.stamp(path)
        return self._streamed(path)

    def stamp(self, path: Path) -> str:
        if _is_saved(self.source) or Path(self.source).expanduser().is_dir():
            with _readable(path):
                files = [Path(one["filename"]) for one in self._loaded(path.name).cache_files]
            return " ".join([path.name, *(f"{file.name} {super(Splits, self).stamp(file)}" for file in files)])
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            what = (
                f"data.stream=true reads {self.source} for as long as the run goes on, and data.revision is no commit"
            )
            raise UserError.of(
                what, "set data.revision to the commit's 40 digits, so that a resume meets the same rows"
            )
        if set(path.name) & set("[+("):
            what = f"data.train={path.name} is part of a split, or several, and only a whole one can be streamed"
            raise UserError.of(what, "name one split, or leave out data.stream")
        return f"{self.config} {self.revision} {path.name}"

    def _rows(self, found: Any) -> Iterator[Any]:
        """In Arrow's form, so that images and sounds stay bytes, and nothing is decoded."""
        for table in found.with_format("arrow").iter(batch_size=_BATCH):
            table.validate(full=True)
            for batch in table.to_batches():
                yield from records(batch, self.limits)

    def _streamed(self, path: Path) -> Iterator[Numbered]:
        import datasets

        with _readable(path):
            whole = re.split(r"[\[+(]", path.name)[0]  # parts of a split cannot be streamed
            found = datasets.load_dataset(**self._asked, split=whole, streaming=True)
            yield from enumerate(self._rows(found), start=1)

    def _loaded(self, split: str) -> Any:
        if _is_saved(self.source):
            return _saved(self.source, split)
        import datasets

        return datasets.load_dataset(**self._asked, split=split)

    @property
    def _asked(self) -> dict[str, Any]:
        source = str(Path(self.source).expanduser()) if Path(self.source).expanduser().is_dir() else self.source
        return {"path": source, "name": self.config or None, "revision": self.revision or None}


def _is_saved(source: str) -> bool:
    folder = Path(source).expanduser()
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(source: str, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a data set without splits is `train`."""
    import datasets

    folder = Path(source).expanduser()
    for state in folder.rglob("state.json"):
        for entry in json.loads(state.read_bytes())["_data_files"]:
            if Path(entry["filename"]).name != entry["filename"]:
                raise ValueError(f"{state} names {entry['filename']}, which is no file of its folder")
    found = datasets.load_from_disk(str(folder))
    splits = found if isinstance(found, dict) else {"train": found}
    asked = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(one) for name, one in splits.items()})
    return datasets.concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in asked])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises UserError for whatever the library finds wrong; its own errors are of many kinds.

    Of each request that the hub did not answer it would tell, five times over, before it says in the end what is wrong.
    """
    logging.getLogger("huggingface_hub.utils").setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{path} cannot be read: {type(error).__name__}: {error}"
        cure = _UNREACHED if isinstance(error, ConnectionError) else _UNREAD
        raise UserError.of(what, cure) from error
