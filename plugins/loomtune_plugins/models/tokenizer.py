"""Tokenizers of Hugging Face. Importing this imports no torch, and neither does making most tokenizers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loomtune.contracts import Tokenizer
from loomtune.errors import UserError
from loomtune_plugins.models import templates
from loomtune_plugins.models.new_tokens import add, write

# Classes that do no more than read `tokenizer.json`. AutoTokenizer would import torch for them too.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a folder, as transformers makes it.

    folder: holds `tokenizer.json` or what else its class reads.
    chat_template: a Jinja file, or the name of one of ours, in place of its own.
    new_tokens: special tokens to add to it. Raises UserError where it cannot be made or has no end-of-sequence token.
    """

    def __init__(
        self, folder: Path, chat_template: str = "", trusted: bool = False, new_tokens: Sequence[str] = ()
    ) -> None:
        """`new_ids` has the id of each new token, of those too that the tokenizer had already."""
        self._folder = folder
        self._overridden = bool(chat_template)
        self._tokenizer = _load(folder, trusted)
        known = self._tokenizer.get_vocab() if new_tokens else {}
        self.new_ids = add(self._tokenizer, new_tokens, known) if new_tokens else {}
        self._added = {token: number for token, number in self.new_ids.items() if token not in known}
        if chat_template:
            self._tokenizer.chat_template = templates.chosen(chat_template, self._tokenizer.get_vocab())
        self.eos_id = self._end()
        self.bos_id = self._tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and self._tokenizer("a")["input_ids"][:1] == [self.bos_id]
        self.pad_id = self._padding()

    @property
    def size(self) -> int:
        """The largest token id that text can give, and one; without those that were added here."""
        own = self._tokenizer.get_vocab()
        return 1 + int(max(number for token, number in own.items() if token not in self._added))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised, none is added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, exactly: no spaces are tidied away."""
        text: str = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def template(self) -> str:
        """The text of the chat template, where there are several of the usual one."""
        own = self._tokenizer.chat_template or ""
        return str(own.get("default", "") if isinstance(own, dict) else own)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reply: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation in the chat template's words. Raises UserError where there is none, or where it objects."""
        several, template = self._tokenizer.chat_template, self.template
        if tools and isinstance(several, dict):
            template = several.get("tool_use", template)
        if not template:
            raise UserError.of(
                f"the tokenizer in '{self._folder}' has no chat template, so conversations cannot be written out",
                f"set model.chat_template=FILE to a Jinja file, or to one of {', '.join(templates.MARKS)}, "
                "or use rows with `prompt` and `completion`",
            )
        return templates.render(template, messages, tools, reply=reply, special=self._special)

    @cached_property
    def _special(self) -> dict[str, str]:
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The end of a text, and that with which the chat template ends the assistant's turn."""
        return tuple(dict.fromkeys(end for end in (self.eos_id, self.turn_end) if end is not None))

    @cached_property
    def turn_end(self) -> int | None:
        """The token with which the chat template ends the assistant's turn; None where it is no token of its own."""
        said = "What was said last"
        try:
            text = self.render([{"role": "user", "content": "What?"}, {"role": "assistant", "content": said}])
        except UserError:
            return None
        first = self.encode(text.rpartition(said)[2].strip())[:1]
        return first[0] if first and first[0] in self._tokenizer.added_tokens_decoder else None

    @cached_property
    def _digest(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        pieces = backend.to_str() if backend is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        rest = [type(self._tokenizer).__name__, self._tokenizer.chat_template, self.eos_id, self.bos_id, self.pad_id]
        rest.append(self._special)
        return hashlib.sha256((pieces + json.dumps(rest, sort_keys=True)).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Digest of vocabulary, merges, special tokens and chat template; the folder's name is no part of it."""
        return self._digest

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's own files, so that any version of any library reads them as before."""
        folder.mkdir(parents=True, exist_ok=True)
        found = [self._folder / name for name in FILES if (self._folder / name).is_file()]
        if not any(file.stem == "tokenizer" for file in found):
            self._tokenizer.save_pretrained(folder)
            return
        for file in found:
            shutil.copyfile(file, folder / file.name)
        if self._added:
            write(folder, self._added)
        self._save_template(folder)

    def _save_template(self, folder: Path) -> None:
        settings = folder / "tokenizer_config.json"
        if self._overridden and settings.is_file():
            templates.without_template(settings)
        if self._tokenizer.chat_template:
            templates.save(folder, self._tokenizer.chat_template)

    def _end(self) -> int:
        end = self._tokenizer.eos_token_id
        config = self._folder / "config.json"
        if end is None and config.is_file():
            end = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
            end = end[0] if isinstance(end, list) else end
        if end is None:
            raise UserError.of(
                f"the tokenizer in '{self._folder}' names no end-of-sequence token, so no completion could end",
                "name an `eos_token` in tokenizer_config.json, or set model.tokenizer to another tokenizer's folder",
            )
        return int(end)

    def _padding(self) -> int:
        """An id to fill rows with. It is never read, since masks go by length, but must not look like an end."""
        tokenizer = self._tokenizer
        choices = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
        return int(next(choice for choice in choices if choice is not None and choice != self.eos_id))


def _load(folder: Path, trusted: bool) -> Any:
    settings = folder / "tokenizer_config.json"
    declared = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    plain = declared.get("tokenizer_class") in PLAIN and (folder / "tokenizer.json").is_file()
    try:
        if plain and "auto_map" not in declared:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trusted)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise UserError.of(
            f"no tokenizer can be made from '{folder}': {error}",
            "set model.tokenizer to a folder with a tokenizer.json",
        ) from error
