"""What is learned under ten chat templates of well-known models, against a table that was made by hand.

In the table, what is learned stands between ⟦ and ⟧; all else of a rendering is given.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loomtune.contracts import Tokenizer
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings
from plugins.objectives.conftest import byte_folder

TEMPLATES = Path(__file__).parents[1] / "models" / "templates"
ONE = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}]
MANY = [
    {"role": "system", "content": "You are kind."},
    *ONE,
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALLING = [
    {"role": "user", "content": "Rain in Köln?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "wet"},
    {"role": "assistant", "content": "Yes."},
]


@dataclass(frozen=True)
class Model:
    """Its own beginning and end, and its renderings. many: with a system prompt; empty: refused where all is learned.

    last: of `many`, where only the last turn is learned; empty: as `many`, with no more than that.
    """

    bos: str
    eos: str
    one: str
    many: str
    last: str = ""

    def of_last(self) -> str:
        earlier, mark, last = self.many.rpartition("⟦")
        return self.last or earlier.replace("⟦", "").replace("⟧", "") + mark + last


LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n"
)
MODELS = {
    "llama2": Model(
        "<s>",
        "</s>",
        "<s>[INST] Hello! [/INST]⟦ Hi there. </s>⟧",
        "<s>[INST] <<SYS>>\nYou are kind.\n<</SYS>>\n\nHello! [/INST]⟦ Hi there. </s>⟧"
        "<s>[INST] Two and two? [/INST]⟦ Four. </s>⟧",
    ),
    "llama3": Model(
        "<|begin_of_text|>",
        "<|eot_id|>",
        LLAMA3 + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi there.<|eot_id|>⟧",
        LLAMA3 + "You are kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi there.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo and two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Four.<|eot_id|>⟧",
    ),
    "mistral": Model(
        "<s>",
        "</s>",
        "<s> [INST] Hello! [/INST]⟦ Hi there.</s>⟧",
        "<s> [INST] You are kind.\n\nHello! [/INST]⟦ Hi there.</s>⟧ [INST] Two and two? [/INST]⟦ Four.</s>⟧",
    ),
    "zephyr": Model(
        "<s>",
        "</s>",
        "<|user|>\nHello!</s>\n<|assistant|>\n⟦Hi there.</s>⟧\n",
        "<|system|>\nYou are kind.</s>\n<|user|>\nHello!</s>\n<|assistant|>\n⟦Hi there.</s>⟧\n"
        "<|user|>\nTwo and two?</s>\n<|assistant|>\n⟦Four.</s>⟧\n",
    ),
    "qwen2_5": Model(
        "",
        "<|im_end|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n⟦Hi there.<|im_end|>⟧\n",
        "<|im_start|>system\nYou are kind.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n⟦Hi there.<|im_end|>⟧\n"
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n",
    ),
    "qwen3": Model(
        "",
        "<|im_end|>",
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHi there.<|im_end|>⟧\n",
        "",  # the thoughts of an answer go away once another question follows
        "<|im_start|>system\nYou are kind.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n"
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nFour.<|im_end|>⟧\n",
    ),
    "gemma": Model(
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n⟦Hi there.<end_of_turn>\n<eos>⟧",
        "<bos><start_of_turn>user\nYou are kind.\n\nHello!<end_of_turn>\n<start_of_turn>model\n"
        "⟦Hi there.<end_of_turn>⟧\n<start_of_turn>user\nTwo and two?<end_of_turn>\n<start_of_turn>model\n"
        "⟦Four.<end_of_turn>\n<eos>⟧",
    ),
    "phi3": Model(
        "<s>",
        "<|endoftext|>",
        "<|user|>\nHello!<|end|>\n<|assistant|>\n⟦Hi there.<|end|>\n<|endoftext|>⟧",
        "<|system|>\nYou are kind.<|end|>\n<|user|>\nHello!<|end|>\n<|assistant|>\n⟦Hi there.<|end|>⟧\n"
        "<|user|>\nTwo and two?<|end|>\n<|assistant|>\n⟦Four.<|end|>\n<|endoftext|>⟧",
    ),
    "deepseek": Model(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Hello!<｜Assistant｜>⟦Hi there.<｜end▁of▁sentence｜>⟧",
        "<｜begin▁of▁sentence｜>You are kind.<｜User｜>Hello!<｜Assistant｜>⟦Hi there.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Two and two?<｜Assistant｜>⟦Four.<｜end▁of▁sentence｜>⟧",
    ),
    "granite": Model(
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|start_of_role|>system<|end_of_role|>You are Granite, developed by IBM. You are a helpful AI assistant."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hello!<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Hi there.<|end_of_text|>⟧\n",
        "<|start_of_role|>system<|end_of_role|>You are kind.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello!<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Hi there.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>Two and two?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Four.<|end_of_text|>⟧\n",
    ),
}
CALLED = {
    "llama3": ['{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "Yes.<|eot_id|>"],
    "qwen2_5": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>',
        "Yes.<|im_end|>",
    ],
    "granite": [
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Köln"}}]<|end_of_text|>',
        "Yes.<|end_of_text|>",
    ],
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Makes a model's tokenizer, by default with its own template."""

    def make(name: str, template: Path | None = None) -> HuggingFaceTokenizer:
        folder = byte_folder(tmp_path_factory.mktemp(name), MODELS[name].bos, MODELS[name].eos)
        return HuggingFaceTokenizer(folder, str(template or TEMPLATES / f"{name}.jinja"))

    return make


def marked(row: dict[str, Any], tokenizer: Tokenizer, **settings: str) -> str:
    """A sample's text, with what is learned between ⟦ and ⟧."""
    (segment,) = Sft(SftSettings(**settings)).sample(row, tokenizer, 10_000).segments
    text, before, run = "", False, list[int]()
    for token, learned in [*zip(segment.tokens.tolist(), segment.is_target.tolist(), strict=True), (None, False)]:
        if learned != before or token is None:
            said = tokenizer.decode(run, special=True)
            text += f"⟦{said}⟧" if before else said
            run, before = [], learned
        run.append(token)
    return text


@each_model
def test_one_question_and_its_answer(name: str, known) -> None:
    assert marked({"messages": ONE}, known(name)) == MODELS[name].one


@each_model
def test_every_answer_behind_a_system_prompt(name: str, known) -> None:
    if MODELS[name].many:
        assert marked({"messages": MANY}, known(name)) == MODELS[name].many
    else:
        with pytest.raises(ValueError, match=r"rewrites what came before message 5.*objective\.turns=last"):
            marked({"messages": MANY}, known(name))


@each_model
def test_only_the_last_answer(name: str, known) -> None:
    assert marked({"messages": MANY}, known(name), turns="last") == MODELS[name].of_last()


@each_model
def test_a_system_prompt_from_the_settings_is_one_from_the_row(name: str, known) -> None:
    made = marked({"messages": MANY[1:]}, known(name), turns="last", system=MANY[0]["content"])
    assert made == MODELS[name].of_last()
    own = marked({"messages": MANY}, known(name), turns="last", system="Be brief.")
    assert own == MODELS[name].of_last()


@each_model
def test_every_answers_end_is_learned(name: str, known) -> None:
    tokenizer = known(name)
    if MODELS[name].many:
        ends = re.findall(r"(?:Hi there\.|Four\.) ?([^ ⟧\n]+)", MODELS[name].many)
        assert len(ends) == 2
        for end in ends:
            assert tokenizer.decode(tokenizer.encode(end)) == "", f"{end} is no token of its own"
        assert ends[0] == ends[1]


def test_marks_of_what_is_generated_change_nothing_and_agree(known, tmp_path) -> None:
    said = "{{ m.content }}<|im_end|>"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}SAID{% else %}SAID{% endif %}"
    )
    template = template.replace("SAID", said) + "\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "plain.jinja").write_text(template)
    (tmp_path / "marked.jinja").write_text(template.replace(said, "{% generation %}" + said + "{% endgeneration %}", 1))
    plain, tagged = (known("qwen2_5", tmp_path / f"{name}.jinja") for name in ("plain", "marked"))
    assert marked({"messages": MANY}, plain) == marked({"messages": MANY}, tagged)
    assert marked({"messages": MANY}, plain).count("⟦") == 2

    theirs = AutoTokenizer.from_pretrained(byte_folder(tmp_path, "", "<|im_end|>"))
    theirs.chat_template = tagged.template
    found = theirs.apply_chat_template(MANY, return_dict=True, return_assistant_tokens_mask=True)
    (segment,) = Sft(SftSettings()).sample({"messages": MANY}, plain, 10_000).segments
    assert segment.tokens.tolist() == found["input_ids"]
    assert segment.is_target.tolist() == [bool(one) for one in found["assistant_masks"]]


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("form", ["objects", "text"])
def test_calls_are_learned_and_what_tools_say_is_not(name: str, form: str, known) -> None:
    row: dict[str, Any] = {"messages": CALLING, "tools": [TOOL]}
    if form == "text":  # as services and columns of Parquet have them
        call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        row = {"messages": [CALLING[0], {**CALLING[1], "content": None, "tool_calls": [call]}, *CALLING[2:]]}
        row["tools"] = json.dumps([TOOL])
    text = marked(row, known(name))
    assert [one.strip() for one in re.findall("⟦(.*?)⟧", text, re.DOTALL)] == CALLED[name]
    assert '"name": "weather"' in text.split("⟦")[0], "the schema is given"


def test_thoughts_are_learned_with_the_last_answer_and_leave_the_earlier_ones(known) -> None:
    thinking = [{**message} for message in MANY]
    thinking[2]["content"] = "<think>\nA greeting.\n</think>\n\nHi there."
    thinking[4]["content"] = "<think>\nSmall numbers.\n</think>\n\nFour."
    text = marked({"messages": thinking}, known("qwen3"), turns="last")
    assert "⟦<think>\nSmall numbers.\n</think>\n\nFour.<|im_end|>⟧" in text
    assert "A greeting." not in text and "assistant\nHi there.<|im_end|>" in text
    beside = [*thinking[:4], {"role": "assistant", "content": "Four.", "reasoning": "Small numbers."}]
    assert marked({"messages": beside}, known("qwen3"), turns="last") == text


def test_steps_with_thoughts_of_their_own_are_all_learned(known) -> None:
    thinking = [CALLING[0], {**CALLING[1], "reasoning_content": "Look."}, CALLING[2]]
    thinking += [{"role": "assistant", "content": "Yes.", "reasoning_content": "Wet is rain."}]
    text = marked({"messages": thinking, "tools": [TOOL]}, known("qwen3"))
    first, second = re.findall("⟦(.*?)⟧", text, re.DOTALL)
    assert first.startswith("<think>\nLook.\n</think>") and first.endswith("</tool_call><|im_end|>")
    assert second == "<think>\nWet is rain.\n</think>\n\nYes.<|im_end|>"
