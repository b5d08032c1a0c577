"""Chat templates by name, and which of their marks a tokenizer has to know.

The files are written here after the formats that the families document; each writes a conversation from front to back,
and none writes anything that the conversation does not say. A system prompt goes where the family has it; where it has
none, into the first of the user's turns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.errors import UserError, near

if TYPE_CHECKING:
    from loomtune_plugins.models.templates_rendering import Rendering

KEY = "model.chat_template"
FOLDER = Path(__file__).with_name("chat_templates")

MARKS: Mapping[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "plain": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "vicuna": (),
    "zephyr": (),
}
"""The templates that have a name, and the tokens that each is made of beside a tokenizer's own beginning and end."""


def chosen(name: str, vocabulary: Collection[str]) -> str:
    """The text of a named template, or of a file.

    Raises UserError where there is neither, and for a name whose marks the tokenizer would take to pieces.
    """
    if name not in MARKS:
        return _read(name)
    if absent := [mark for mark in MARKS[name] if mark not in vocabulary]:
        listed = ", ".join(f'"{mark}"' for mark in absent)
        raise UserError.of(
            f"{KEY}={name} is made of tokens that the tokenizer takes to pieces: {listed}",
            f"set 'model.new_tokens=[{listed}]', or {KEY}=plain, which needs none",
        )
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _read(name: str) -> str:
    file = Path(name).expanduser()
    cure = f"set {KEY} to a Jinja file or to one of {', '.join(MARKS)}"
    try:
        if file.stat().st_size > 2**20:
            raise UserError.of(f"the chat template '{name}' has {file.stat().st_size} bytes", cure)
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = f"there is no chat template '{name}', neither a file nor a name.{near(name, MARKS)}"
        raise UserError.of(what, cure) from error
    except (OSError, ValueError) as error:
        raise UserError.of(f"the chat template '{name}' cannot be read: {error}", cure) from error


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    reply: bool,
    special: Mapping[str, str],
) -> str:
    """A conversation in a template's words.

    Raises UserError: with a cause where the template objects to this conversation, without one where it is no chat
    template, is beyond what one may cost, or reaches for what it must not.
    """
    from jinja2.exceptions import SecurityError

    write = _compiled(template)
    try:
        return write(messages, tools, reply=reply, special=special)
    except SecurityError as error:
        _refuse(str(error))
    except MemoryError:
        _refuse("it takes more memory than there is")
    except RecursionError:
        _refuse("it calls itself without end")
    except Exception as error:  # whatever Python makes of what the template says
        what = _objection(error, messages)
        calling = any(message.get("tool_calls") for message in messages)
        better = f"{KEY}=qwen, which writes calls" if calling else f"{KEY} to a template that writes it"
        cure = f"correct the conversation, or set {better}"
        raise UserError.of(f"the chat template cannot write a conversation out: {what}", cure) from error
    raise AssertionError


def _objection(error: Exception, messages: Sequence[Mapping[str, Any]]) -> str:
    """Why a conversation is not written: what the template itself says, or what it does not reckon with."""
    from jinja2.exceptions import TemplateError, UndefinedError

    if isinstance(error, TemplateError) and not isinstance(error, UndefinedError) and str(error):
        return str(error)
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str):
            others = [key for key, value in message.items() if value is not None and key not in ("role", "content")]
            held = f"no text but {', '.join(others)}" if others else "no plain text"
            return f"message {number} ({message.get('role')}) holds {held}, and the template writes text alone"
    return f"it fails over it ({type(error).__name__}: {error})"


def _compiled(template: str) -> Rendering:
    from loomtune_plugins.models.templates_rendering import rendering

    try:
        return rendering(template)
    except Exception as error:  # Jinja's errors, and those of Python's compiler
        _refuse(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    raise AssertionError


def _refuse(why: str) -> None:
    """Raises without a cause: it is about the template, not about a row."""
    raise UserError.of(f"the chat template is refused: {why}", f"set {KEY} to another file or name") from None


def save(folder: Path, template: str | Mapping[str, str]) -> None:
    """Writes where transformers looks: the template, and beside it those of other names."""
    named = {"default": template} if isinstance(template, str) else template
    for name, text in named.items():
        file = folder / "chat_template.jinja"
        if name != "default":
            if Path(name).name != name:
                raise UserError.of(f"a chat template of the tokenizer has the name '{name}'", f"set {KEY} to one file")
            file = folder / "additional_chat_templates" / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def without_template(settings: Path) -> None:
    """Takes a template out of tokenizer_config.json, where the file beside it says another."""
    kept = json.loads(settings.read_text(encoding="utf-8"))
    if kept.pop("chat_template", None) is not None:
        settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
