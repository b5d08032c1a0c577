"""What of a conversation is learned, under the formats of the families of models that people tune."""

from dataclasses import dataclass

import numpy as np
import pytest

from loomtune.contracts import Sample, Tokenizer
from loomtune.errors import UserError
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings

SYSTEM = {"role": "system", "content": "You are kind."}
TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "How many are two and two?"},
    {"role": "assistant", "content": "Four."},
]


@dataclass(frozen=True)
class Family:
    """A chat format: its template, its own tokens, and what is to be learned of the two answers."""

    template: str
    learned: tuple[str, str]
    eos: str = "</s>"
    bos: str = "<s>"
    system: bool = True


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ sys if loop.first else '' }}{{ m.content }} "
    "[/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}" + CHATML
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: "
    "{{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}"
    "### Instruction:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
THINKING = (  # as Qwen 3: only the last answer keeps its thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "chatml": Family(CHATML, ("Hi there.<|im_end|>", "Four.<|im_end|>"), eos="<|im_end|>"),
    "chatml over a base with an end of its own": Family(CHATML, ("Hi there.<|im_end|>", "Four.<|im_end|>\n</s>")),
    "llama2": Family(LLAMA2, (" Hi there. </s>", " Four. </s>")),
    "llama3": Family(LLAMA3, ("Hi there.<|eot_id|>", "Four.<|eot_id|>"), "<|eot_id|>", "<|begin_of_text|>"),
    "llama3 base": Family(
        LLAMA3, ("Hi there.<|eot_id|>", "Four.<|eot_id|><|end_of_text|>"), "<|end_of_text|>", "<|begin_of_text|>"
    ),
    "mistral": Family(MISTRAL, ("Hi there.</s>", "Four.</s>"), system=False),
    "zephyr": Family(ZEPHYR, ("Hi there.</s>", "Four.</s>")),
    "gemma": Family(GEMMA, ("Hi there.<end_of_turn>", "Four.<end_of_turn>\n<eos>"), "<eos>", "<bos>", system=False),
    "phi3": Family(PHI3, ("Hi there.<|end|>", "Four.<|end|>\n<|endoftext|>"), eos="<|endoftext|>"),
    "qwen": Family(QWEN, ("Hi there.<|im_end|>", "Four.<|im_end|>"), eos="<|im_end|>", bos=""),
    "deepseek": Family(DEEPSEEK, (" Hi there.<EOS>", " Four.<EOS>"), "<EOS>", "<BOS>"),
    "vicuna": Family(VICUNA, (" Hi there.</s>", " Four.</s>")),
    "alpaca": Family(ALPACA, ("Hi there.\n\n", "Four.\n\n</s>")),
}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.fixture
def known(tokenizer):
    return lambda family: tokenizer(family.template, bos=family.bos, eos=family.eos, adds_bos=bool(family.bos))


def conversation(family: Family) -> list[dict[str, str]]:
    return [SYSTEM, *TURNS] if family.system else TURNS


def sampled(messages: list[dict[str, str]], tokenizer: Tokenizer, length: int = 10_000, **settings: str) -> Sample:
    return Sft(SftSettings(**settings)).sample({"messages": messages}, tokenizer, length)


def learned(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of consecutive targets."""
    (segment,) = sample.segments
    at = np.flatnonzero(segment.is_target)
    runs = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1) if len(at) else []
    return [tokenizer.decode([int(token) for token in segment.tokens[run]], special=True) for run in runs]


def ids(sample: Sample) -> list[int]:
    return [int(token) for token in sample.segments[0].tokens]


@each_family
def test_what_is_learned_is_what_the_assistant_says_and_the_end_of_its_turn(family: Family, known) -> None:
    tokenizer = known(family)
    assert learned(sampled(conversation(family), tokenizer), tokenizer) == list(family.learned)


@each_family
def test_the_end_token_is_learned_once(family: Family, known) -> None:
    tokenizer = known(family)
    (segment,) = sampled(conversation(family), tokenizer).segments
    last = int(np.flatnonzero(segment.is_target)[-1])
    assert segment.tokens[last] == tokenizer.eos_id
    assert segment.tokens[last - 1] != tokenizer.eos_id


@each_family
def test_the_tokens_are_those_of_the_whole_rendering(family: Family, known) -> None:
    tokenizer = known(family)
    whole = tokenizer.encode(tokenizer.render(conversation(family)))
    made = ids(sampled(conversation(family), tokenizer))
    assert made in (whole, [*whole, tokenizer.eos_id])


@each_family
def test_no_rendering_gets_a_second_beginning(family: Family, known) -> None:
    tokenizer = known(family)
    for bos in ("auto", "always"):
        made = ids(sampled(conversation(family), tokenizer, bos=bos))
        assert made[:2].count(tokenizer.bos_id) <= 1
    assert tokenizer.bos_id is None or made[0] == tokenizer.bos_id


@each_family
def test_a_sample_begins_with_what_the_model_is_asked_with(family: Family, known) -> None:
    tokenizer = known(family)
    row = {"messages": conversation(family)}
    asked = Sft(SftSettings()).prompt(row, tokenizer)
    sample = sampled(row["messages"], tokenizer, turns="last")
    assert ids(sample)[: len(asked)] == asked
    assert not sample.segments[0].is_target[: len(asked)].any()
    assert sample.segments[0].is_target[len(asked)]


@each_family
def test_only_the_last_answer_is_learned_where_that_is_asked(family: Family, known) -> None:
    tokenizer = known(family)
    assert learned(sampled(conversation(family), tokenizer, turns="last"), tokenizer) == [family.learned[1]]


def test_pieces_that_a_tokenizer_begins_with_a_blank_are_those_of_the_whole_rendering(tokenizer) -> None:
    made = tokenizer(VICUNA, pieces=True)
    sample = sampled(TURNS, made)
    assert ids(sample) == made.encode(made.render(TURNS))
    assert [text.strip() for text in learned(sample, made)] == ["Hi there.</s>", "Four.</s>"]


def test_all_tokens_but_the_first_are_learned_where_that_is_asked(tokenizer) -> None:
    sample = sampled(TURNS, tokenizer(CHATML), train_on="all")
    assert sample.targets == sample.length - 1


def test_what_follows_the_last_answer_is_left_out(tokenizer) -> None:
    made = tokenizer(CHATML, eos="<|im_end|>")
    assert ids(sampled([*TURNS, {"role": "user", "content": "Thanks"}], made)) == ids(sampled(TURNS, made))


def test_an_answer_cut_in_the_middle_keeps_what_is_left_and_no_end_is_made_up(tokenizer) -> None:
    made = tokenizer(CHATML, eos="<|im_end|>")
    whole = sampled(TURNS, made)
    cut = sampled(TURNS, made, whole.length - 3)
    assert ids(cut) == ids(whole)[:-3]
    assert cut.targets == whole.targets - 2, "the blank after the last turn is no target"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_a_way_out(tokenizer) -> None:
    made = tokenizer(THINKING, eos="<|im_end|>")
    with pytest.raises(ValueError, match=r"rewrites what came before message 5.*objective\.turns=last"):
        sampled([SYSTEM, *TURNS], made)
    assert learned(sampled([SYSTEM, *TURNS], made, turns="last"), made) == ["<think>\n\n</think>\n\nFour.<|im_end|>"]


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tokenizer) -> None:
    with pytest.raises(ValueError, match="System role not supported"):
        sampled([SYSTEM, *TURNS], tokenizer(GEMMA))


def test_an_answer_that_the_template_leaves_out_is_a_bad_row(tokenizer) -> None:
    silent = "{% for m in messages if m.role == 'user' %}USER: {{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match="writes nothing for message 2"):
        sampled(TURNS, tokenizer(silent))


def test_a_conversation_without_an_answer_is_a_bad_row(tokenizer) -> None:
    with pytest.raises(ValueError, match="no message has the role 'assistant'"):
        sampled(TURNS[:1], tokenizer(CHATML))


def test_a_tokenizer_without_a_template_is_the_users_to_mend(tokenizer) -> None:
    with pytest.raises(UserError, match=r"model\.chat_template"):
        sampled(TURNS, tokenizer())
