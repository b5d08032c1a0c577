"""Models in the format of Hugging Face: folders, hub ids, and what runs left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts.saved import HEADS_FILE
from loomtune.errors import UserError
from loomtune_plugins.models import folders, headers, new_tokens
from loomtune_plugins.models.causal_lm import CausalLM, fingerprint
from loomtune_plugins.models.settings import HuggingFaceSettings, TinySettings

if TYPE_CHECKING:
    from loomtune.contracts import WeightSource


class HuggingFace(CausalLM):
    """A model with weights in safetensors files. No pickle is ever read, and no code run unless it is trusted."""

    draws = False

    def __init__(self, settings: HuggingFaceSettings) -> None:
        self._settings = settings
        self.attention, self.chat_template = settings.attention, settings.chat_template
        self.trusted, self.owns_tokenizer = settings.trust_remote_code, not settings.tokenizer
        self.new_tokens, self.pad_vocabulary_to = settings.new_tokens, settings.pad_vocabulary_to

    @cached_property
    def folder(self) -> Path:
        """Where the model's files are; a hub id is downloaded when this is first asked."""
        chosen = self._settings
        return self._here or folders.resolve(chosen.path, chosen.checkpoint, chosen.revision, chosen.trust_remote_code)

    @cached_property
    def _here(self) -> Path | None:
        """The folder of what is no hub id; looked for once, since a run that is the model may go on."""
        return folders.locate(self._settings.path, self._settings.checkpoint)

    @property
    def origin(self) -> str:
        """The folder's whole path, which means the same wherever a server is started; an id stays what it is."""
        return str(self._here.absolute()) if self._here else self._settings.path

    def find(self) -> None:
        """Finds the files and reads the config of what is no hub id."""
        new_tokens.check(self.new_tokens, self.pad_vocabulary_to)
        if folder := folders.locate(self._settings.path, self._settings.checkpoint):
            folders.read_config(folder)
            folders.weight_files(folder)
        folders.locate(self._settings.tokenizer)

    def at_hand(self) -> bool:
        """True for a folder, the shipped one and a run's among them."""
        try:
            folder = folders.locate(self._settings.path, self._settings.checkpoint)
        except UserError:
            return False
        return folder is not None and (folder / "config.json").is_file()

    def stored(self) -> Mapping[str, tuple[int, ...]]:
        """By the headers of the files; empty for a hub id that was not asked for yet, and where files are faulty."""
        chosen = self._settings
        try:
            folder = self.__dict__.get("folder") or folders.locate(chosen.path, chosen.checkpoint)
            return headers.shapes(folders.weight_files(folder)) if folder else {}
        except (UserError, OSError, ValueError):
            return {}  # `check` says what is wrong

    def check(self) -> None:
        """Finds the files and reads the config; downloads a hub id."""
        if self.trusted:
            self._warn()
        new_tokens.check(self.new_tokens, self.pad_vocabulary_to)
        self.described()
        folders.weight_files(self.folder)
        super().check()

    def _warn(self) -> None:
        import sys

        line = f"model.trust_remote_code=true: Python code from '{self._settings.path}' RUNS WITH YOUR RIGHTS"
        print(f"loomtune: {line}", file=sys.stderr)  # noqa: T201

    def described(self) -> Mapping[str, Any]:
        """What `config.json` says."""
        return folders.read_config(self.folder)

    def published(self) -> Any:
        """The config, from the folder alone."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(self.folder), trust_remote_code=self.trusted)

    def tokenizer_folder(self) -> Path:
        """The model's folder, or that of another tokenizer."""
        other = self._settings.tokenizer
        return folders.resolve(other, trusted=self.trusted) if other else self.folder

    def fingerprint(self) -> str:
        """Digest of config and weights, wherever they lie."""
        files = [self.folder / "config.json", *folders.weight_files(self.folder)]
        files += [heads] if (heads := self.folder / HEADS_FILE).is_file() else []
        return fingerprint([folders.digest(file) for file in files], *self.grown())

    def weights(self, seed: int) -> WeightSource:
        """What the files hold; nothing is drawn."""
        from loomtune_plugins.models.stored import StoredWeights

        heads = self.folder / HEADS_FILE
        files, rows = folders.weight_files(self.folder), self.stored_rows()
        return StoredWeights(files, self.ghost(), heads if heads.is_file() else None, rows)

    def _set_generation(self, settings: Any) -> None:
        super()._set_generation(settings)
        if (self.folder / "generation_config.json").is_file():
            from transformers import GenerationConfig

            ends = GenerationConfig.from_pretrained(str(self.folder)).eos_token_id
            settings.eos_token_id = self._stops(ends) if ends is not None else settings.eos_token_id

    def save_config(self, folder: Path, dtype: str = "float32") -> None:
        """Writes `config.json`, and copies the settings of generation and trusted code."""
        super().save_config(folder, dtype)
        code = sorted(self.folder.glob("*.py")) if self.trusted else []
        for file in (self.folder / "generation_config.json", *code):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        self._save_stops(folder / "generation_config.json")

    def _save_stops(self, file: Path) -> None:
        """Adds the end of a turn where the model's own settings, made for another template, do not know it."""
        settings = json.loads(file.read_text(encoding="utf-8"))
        ends = settings.get("eos_token_id") or self._tokenizer.eos_id
        if (stops := self._stops(ends)) != ends:
            file.write_text(json.dumps({**settings, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8")


class Tiny(HuggingFace):
    """The shipped model."""

    def __init__(self, settings: TinySettings) -> None:
        super().__init__(HuggingFaceSettings(**asdict(settings)))
