"""What is refused, with a cure, rather than learned otherwise than it was said; and what is not."""

import json

import pytest

from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.conversations import Conversation, Piece
from loomtune_plugins.objectives.dpo import Dpo
from loomtune_plugins.objectives.dpo_settings import DpoSettings
from loomtune_plugins.objectives.encoding import join
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings

TALK = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Question: two and two?"},
    {"role": "assistant", "content": "Apples."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Hi, four."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPENING

LOSING = {
    "a user's words": (
        CHATML.replace("m in messages", "m in messages if m.content != 'How many?'"),
        "message 4 (user)",
    ),
    "the system prompt": (CHATML.replace("m in messages", "m in messages if m.role != 'system'"), "1 (system)"),
    "the end of each content": (CHATML.replace("m.content", "m.content[:12]"), "message 1 (system)"),
    "an answer's capitals": (
        CHATML.replace("m.content", "(m.content | upper if m.role == 'assistant' else m.content)"),
        "message 3 (assistant)",
    ),
    "all but its own words": (
        CHATML.replace("m.content", "('Sure.' if m.role == 'assistant' and loop.last else m.content)"),
        "message 5 (assistant)",
    ),
    "the beginning of what is long": (
        CHATML.replace("m in messages", "m in (messages[-2:] if messages | length > 3 else messages)"),
        "rewrites",
    ),
}


def of(template: str, tokenizer, messages=TALK, tools=None, **settings) -> str:
    """What is learned, in the order of the text."""
    made = tokenizer(template, eos="<|im_end|>")
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    (segment,) = Sft(SftSettings(**settings)).sample(row, made, 10_000).segments
    return made.decode(segment.tokens[segment.is_target].tolist(), special=True)


@pytest.mark.parametrize("name", LOSING)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_template_that_loses_or_changes_what_was_said_is_refused(name: str, turns: str, tokenizer) -> None:
    template, message = LOSING[name]
    with pytest.raises(ValueError) as refused:
        of(template, tokenizer, turns=turns)
    assert message in str(refused.value) or "rewrites" in str(refused.value)
    assert "model.chat_template" in str(refused.value) or "objective.turns=last" in str(refused.value)


def test_a_template_that_moves_what_was_said_is_refused(tokenizer) -> None:
    turned = CHATML.replace("m in messages", "m in (messages | selectattr('role', 'eq', 'user') | list + messages)")
    moved = "{% set users = messages | selectattr('role', 'eq', 'user') | list %}" + (
        "{% if users | length > 1 %}{{ users[1].content }}{{ users[0].content }}{{ messages[2].content }}"
        "{{ messages[0].content }}{% endif %}" + OPENING + "{% if messages[-1].role == 'assistant' %}"
        "<|im_start|>assistant\n{{ messages[-1].content }}<|im_end|>{% endif %}"
    )
    with pytest.raises(ValueError, match=r"moves what message \d \(\w+\) says.*model\.chat_template"):
        of(moved, tokenizer, turns="last")
    with pytest.raises(ValueError, match="rewrites"):
        of(turned, tokenizer)


def test_an_answer_is_looked_for_in_its_own_turn(tokenizer) -> None:
    same = [*TALK[:2], TALK[4], TALK[3], TALK[4]]
    other = CHATML.replace("m.content", "('Sure.' if loop.index0 == 2 else m.content)")
    with pytest.raises(ValueError, match=r"what message 3 \(assistant\) says, 'Hi, four\.'"):
        of(other, tokenizer, same)


def test_blanks_around_what_was_said_may_go_and_are_then_not_learned(tokenizer) -> None:
    padded = [{**message, "content": f"\n  {message['content']} \n"} for message in TALK]
    trimmed = CHATML.replace("m.content", "m.content | trim")
    assert of(trimmed, tokenizer, padded) == of(CHATML, tokenizer)
    assert of(CHATML, tokenizer, padded) == "\n  Apples. \n<|im_end|>\n  Hi, four. \n<|im_end|>"


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer) -> None:
    known = CHATML.replace("m in messages", "m in messages if m.role in ('system', 'user', 'assistant')")
    told = [*TALK[:2], {"role": "tool", "content": "wet"}, TALK[2]]
    with pytest.raises(ValueError, match=r"leaves out, or changes, what message 3 \(tool\) says, 'wet'"):
        of(known, tokenizer, told)


ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}assistant: {% endif %}"


def test_turns_without_an_end_are_refused_but_for_the_last(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"ends message 3 \(assistant\) with nothing.*objective\.turns=last"):
        of(ENDLESS, tokenizer)
    with pytest.raises(ValueError, match=r"ends message 3 \(assistant\) with nothing"):
        of(
            ENDLESS.replace("m.content", "m.content | trim"),
            tokenizer,
            [*TALK[:2], {**TALK[2], "content": " a "}, *TALK[3:]],
        )
    assert of(ENDLESS, tokenizer, turns="last") == "Hi, four.<|im_end|>", "which ends with the tokenizer's end"
    assert of(ENDLESS, tokenizer, TALK[:3]) == "Apples.<|im_end|>"


@pytest.mark.parametrize("said", ["s", "a", "user", "Hi, four.", "Apples."])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_words_that_the_template_drops_are_missed_though_they_are_elsewhere(said: str, turns: str, tokenizer) -> None:
    told = [*TALK[:3], {"role": "user", "content": said}, TALK[4]]
    dropping = CHATML.replace("{{ m.content }}", "{{ m.content if loop.index0 != 3 }}")
    with pytest.raises(ValueError, match=r"message 4 \(user\)"):
        of(dropping, tokenizer, told, turns=turns)
    assert of(CHATML, tokenizer, told, turns=turns).endswith("Hi, four.<|im_end|>")


def test_an_answer_that_the_template_writes_twice_is_refused(tokenizer) -> None:
    twice = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %} {{ m.content }}{% endif %}"
    )
    with pytest.raises(ValueError, match="writes what message 3 says more than once"):
        of(twice, tokenizer)
    echo = [
        TALK[1],
        {"role": "assistant", "content": "No no no."},
        TALK[3],
        {"role": "assistant", "content": "end im_end"},
    ]
    assert of(CHATML, tokenizer, echo) == "No no no.<|im_end|>end im_end<|im_end|>", "which is no fault"


def test_answers_of_weight_0_are_not_learned(tokenizer) -> None:
    weighed = [*TALK[:2], {**TALK[2], "weight": 0}, TALK[3], {**TALK[4], "weight": 1}]
    assert of(CHATML, tokenizer, weighed) == "Hi, four.<|im_end|>"
    weighed = [*TALK[:2], {**TALK[2], "weight": 1.0}, TALK[3], {**TALK[4], "weight": 0.0}]
    assert of(CHATML, tokenizer, weighed) == "Apples.<|im_end|>"
    with pytest.raises(ValueError, match="the last answer has weight 0"):
        of(CHATML, tokenizer, weighed, turns="last")
    with pytest.raises(ValueError, match="all answers have weight 0"):
        of(CHATML, tokenizer, [TALK[1], {**TALK[2], "weight": 0}])
    for weight in (0.5, 2, "1", -1, [1]):
        with pytest.raises(ValueError, match="message 2 has the weight"):
            of(CHATML, tokenizer, [TALK[1], {**TALK[2], "weight": weight}])


@pytest.mark.parametrize("written", ["c.function.name", "c.function.name ~ c.function.arguments.values() | list",
                                     "c.function.name ~ c.function.arguments.keys() | list"])  # fmt: skip
@pytest.mark.parametrize("arguments", [{"a": 5, "flag": True}, {"ratio": 0.25}, {"flags": [False]}])
def test_keys_numbers_and_truths_of_calls_that_the_template_leaves_out_are_refused(
    written: str, arguments, tokenizer
) -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ WRITTEN }}{% endfor %}<|im_end|>"
    calling = [
        TALK[1],
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]},
    ]
    with pytest.raises(ValueError, match=r"what message 2 \(assistant\) says"):
        of(CHATML.replace("<|im_end|>", calls.replace("WRITTEN", written), 1), tokenizer, calling)
    for whole in ("c | tojson", "c | string", "c | tojson(indent=2)"):
        assert of(CHATML.replace("<|im_end|>", calls.replace("WRITTEN", whole), 1), tokenizer, calling)


def test_what_a_template_objects_to_comes_with_its_cure(tokenizer) -> None:
    call = {"function": {"name": "weather", "arguments": {}}}
    with pytest.raises(ValueError, match=r"holds no text but tool_calls.*set model\.chat_template=qwen"):
        of(
            CHATML.replace("m.content", "m.content + ''"),
            tokenizer,
            [TALK[1], {"role": "assistant", "tool_calls": [call]}],
        )


def test_tools_that_the_template_leaves_out_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="leaves the row's tools out"):
        of(CHATML, tokenizer, tools=TOOLS)
    with_tools = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML
    assert of(with_tools, tokenizer, tools=TOOLS) == of(CHATML, tokenizer)


def test_calls_that_the_template_leaves_out_are_refused(tokenizer) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    calling = [TALK[1], {"role": "assistant", "content": "I look.", "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"message 2 \(assistant\) says, 'weather'"):
        of(CHATML, tokenizer, calling)


def test_thoughts_that_the_template_leaves_out_are_refused_where_they_would_be_learned(tokenizer) -> None:
    thinking = [TALK[1], {**TALK[2], "reasoning_content": "Fruit."}, TALK[3], TALK[4]]
    with pytest.raises(ValueError, match=r"message 2 \(assistant\) says, 'Fruit\.'"):
        of(CHATML, tokenizer, thinking)
    assert of(CHATML, tokenizer, thinking, turns="last") == "Hi, four.<|im_end|>"


def test_a_system_prompt_that_is_kept_for_the_last_question_is_learned_with_the_last_answer(tokenizer) -> None:
    """As Mistral 7B Instruct v0.3 does."""
    late = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set turns = messages | rejectattr('role', 'eq', 'system') | list %}{% for m in turns %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last or loop.index == turns | length - 1 and not "
        "add_generation_prompt %}{{ system }}\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"rewrites what came before.*objective\.turns=last"):
        of(late, tokenizer)
    assert of(late, tokenizer, turns="last") == " Hi, four.<|im_end|>"


def test_an_end_of_turn_that_the_last_one_alone_has_otherwise_is_learned_in_each(tokenizer, tmp_path) -> None:
    """As gpt-oss has it: `<|return|>` ends a conversation, and `<|end|>` each turn once another follows."""
    from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer
    from plugins.objectives.conftest import byte_folder

    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' and not "
        "add_generation_prompt else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    made = HuggingFaceTokenizer(byte_folder(tmp_path, "", "<|return|>", template))
    (segment,) = Sft(SftSettings()).sample({"messages": TALK}, made, 10_000).segments
    learned = made.decode(segment.tokens[segment.is_target].tolist(), special=True)
    said = "<|channel|>final<|message|>{}"
    assert learned == said.format("Apples.<|end|>") + said.format("Hi, four.<|return|>")


def test_a_template_that_takes_no_system_prompt_says_so_of_the_settings_too(tokenizer) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert of(strict, tokenizer, TALK[1:])
    with pytest.raises(ValueError, match="no system role"):
        of(strict, tokenizer, TALK[1:], system="You are kind.")


def test_a_system_prompt_before_rows_that_are_no_conversations_is_refused(tokenizer) -> None:
    made, objective = tokenizer(CHATML), Sft(SftSettings(system="You are kind."))
    for row in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        with pytest.raises(ValueError, match=r"no conversation.*leave objective\.system empty"):
            objective.sample(row, made, 100)
    with pytest.raises(ValueError, match=r"objective\.system"):
        objective.prompt({"prompt": "a", "completion": "b"}, made)


def test_pairs_are_asked_with_the_system_prompt_and_the_tools(tokenizer) -> None:
    made = tokenizer("{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML, eos="<|im_end|>")
    row = {"prompt": [TALK[1]], "chosen": [TALK[2]], "rejected": [TALK[4]], "tools": json.dumps(TOOLS)}
    prompt, chosen, rejected = Dpo(DpoSettings(system="You are kind.")).sample(row, made, 1000).segments
    asked = made.decode(prompt.tokens.tolist(), special=True)
    assert asked.startswith('{"type": "function"') and "system\nYou are kind.<|im_end|>" in asked
    answers = [made.decode(one.tokens[one.is_target].tolist(), special=True) for one in (chosen, rejected)]
    assert answers == ["Apples.<|im_end|>", "Hi, four.<|im_end|>"]


def test_the_system_prompt_is_part_of_every_fingerprint() -> None:
    from loomtune_plugins.objectives.kto import Kto
    from loomtune_plugins.objectives.kto_settings import KtoSettings
    from loomtune_plugins.objectives.reward import RewardModel
    from loomtune_plugins.objectives.reward_settings import RewardSettings

    kinds = [(Sft, SftSettings), (Dpo, DpoSettings), (Kto, KtoSettings), (RewardModel, RewardSettings)]
    for objective, settings in kinds:
        assert objective(settings()).fingerprint() != objective(settings(system="You are kind.")).fingerprint()


@pytest.mark.parametrize(("tools", "what"), [("[{", "no JSON"), ("3", "no list"), ([3], "no list"), ({}, "no list")])
def test_tools_that_are_none_are_refused(tools, what: str, tokenizer) -> None:
    if tools == {}:
        tools = {"name": "weather"}
    with pytest.raises(ValueError, match=f"has tools that are {what}"):
        of(CHATML, tokenizer, tools=tools)


@pytest.mark.parametrize("calls", ["weather", ["weather"], {"name": "weather"}])
def test_calls_that_are_none_are_refused(calls, tokenizer) -> None:
    with pytest.raises(ValueError, match="has tool_calls that are no list of calls"):
        of(CHATML, tokenizer, [TALK[1], {**TALK[2], "tool_calls": calls}])


def test_a_tokenizer_that_knows_no_tools_is_not_given_any() -> None:
    class Old(ToyTokenizer):
        def render(self, messages, *, reply=False):
            return super().render(messages, reply=reply)

    pieces = Conversation.of({"messages": TALK}).pieces(Old(), last_only=False)
    assert [piece.text for piece in pieces if piece.learned] == ["Apples.\n", "Hi, four.\n"]


class Counting(ToyTokenizer):
    """Puts a blank before each text, as SentencePiece does, and counts what it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return super().encode(" " + text) if text else []


@pytest.mark.parametrize("prompt", ["Answer: ", "Answer:", "Answer:\n", "assistant: ", "a: b: "])
@pytest.mark.parametrize("completion", ["Apples", "four", "A A"])
def test_no_blank_is_doubled_where_a_tokenizer_puts_one_before_each_text(
    prompt: str, completion: str, tokenizer
) -> None:
    made = tokenizer(pieces=True)
    objective, row = Sft(SftSettings()), {"prompt": prompt, "completion": completion}
    (segment,) = objective.sample(row, made, 100).segments
    asked = objective.prompt(row, made)
    assert segment.tokens.tolist()[: len(asked)] == asked, "what is trained begins with how the model is asked"
    tokens = [token for token in segment.tokens.tolist() if token != made.eos_id]
    assert made.decode(tokens).replace("\n", "") == (prompt + completion).replace("\n", "")


def test_no_blank_is_doubled_behind_turns_that_end_with_one(tokenizer) -> None:
    template = ENDLESS.replace("{{ m.content }}", "{{ m.content }}</s>")
    made = tokenizer(template, pieces=True)
    (segment,) = Sft(SftSettings()).sample({"messages": TALK[1:]}, made, 1000).segments
    assert made.decode(segment.tokens[segment.is_target].tolist(), special=True) == "Apples.</s>Hi, four.</s>"
    assert made.decode(segment.tokens.tolist(), special=True) == made.render(TALK[1:])


def test_long_conversations_are_not_tokenised_once_for_each_turn() -> None:
    pieces = [Piece(f"{number:09}.", bool(number % 2)) for number in range(200)]
    tokenizer = Counting()
    encoded = join(pieces, tokenizer)
    assert encoded.ids == ToyTokenizer().encode(" " + "".join(piece.text for piece in pieces))
    assert tokenizer.characters < 6 * sum(len(piece.text) for piece in pieces)
