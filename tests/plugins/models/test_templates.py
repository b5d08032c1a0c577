"""Chat templates: by name, as transformers renders them, and away with the model."""

# ruff: noqa: E501 - one long template

import json
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loomtune.errors import UserError
from loomtune_plugins.models import templates
from loomtune_plugins.models.huggingface import HuggingFace
from loomtune_plugins.models.settings import HuggingFaceSettings
from loomtune_plugins.models.templates_budget import Budget
from loomtune_plugins.models.templates_filters import Guards
from loomtune_plugins.models.tokenizer import HuggingFaceTokenizer

WRITTEN = Path(__file__).with_name("templates")
EVERY = [*sorted(WRITTEN.glob("*.jinja")), *(templates.FOLDER / f"{name}.jinja" for name in sorted(templates.MARKS))]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "<now> & 'then'", "parameters": {"type": "object"}},
}
ONE = [{"role": "user", "content": " Hello, Köln! "}, {"role": "assistant", "content": "Hi <there> & 'all'.\n"}]
MORE = [{"role": "user", "content": "Two & two?"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFour."}]
SYSTEM = [{"role": "system", "content": "You are kind."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5, None]}}}
CALLING = [ONE[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "wet"}, ONE[1]]
TALKS = {
    "one": (ONE, None),
    "many": ([*ONE, *MORE], None),
    "system": ([*SYSTEM, *ONE, *MORE], None),
    "thoughts": ([*ONE, MORE[0], {"role": "assistant", "content": "Four.", "reasoning": "Hm."}], None),
    "tools": (CALLING, [TOOL]),
    "nothing": ([{**ONE[0], "name": None}, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [TOOL]),
}
WITH_TOOLS = ("qwen", "qwen2_5", "qwen3", "llama3", "granite")


def ours(template: str, messages, tools=None, reply=False) -> str:
    return templates.render(template, messages, tools, reply=reply, special=SPECIAL)


@pytest.fixture(scope="module")
def theirs():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def renderings():
    for file in EVERY:
        for name, (_, tools) in TALKS.items():
            if not tools or (file.stem in WITH_TOOLS and (file.parent == WRITTEN or file.stem == "qwen")):
                yield pytest.param(file, name, id=f"{file.parent.name}-{file.stem}-{name}")


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize(("file", "talk"), [*renderings()])
def test_a_template_writes_what_it_writes_in_transformers(file: Path, talk: str, reply: bool, theirs) -> None:
    messages, tools = TALKS[talk]
    how = {"tokenize": False, "add_generation_prompt": reply, "chat_template": file.read_text(), "tools": tools}
    assert ours(file.read_text(), messages, tools, reply) == theirs.apply_chat_template(messages, **how)


SAYINGS = """{%- set ns = namespace(found=[], n=0) %}{%- macro say(x, y='-') %}{{ x }}{{ y }}{% endmacro %}
{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}
{{- say(m.role | upper, y=m.content | length) }}{% set ns.found = ns.found + [m.role] %}{% set ns.n = ns.n + 2 %}{% endfor %}
{{ ns.found | join(', ') }}|{{ ns.found }}|{{ {'a': (1, 2.0, none, true)} }}|{{ ns.n // 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ -3 * 2 }}{{ 1 / 4 }}
{{ '%s-%03d' % ('x', 7) }}|{{ 'a{}b{:>4}'.format(1, 'c') }}|{{ '{x}'.format_map({'x': 'y'}) }}|{{ 'ab' * 3 }}|{{ ('<b>' | safe) + '<i>' }}
{{ messages | map(attribute='role') | list | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ [3, 1, 2] | sort | reverse | list }}
{{ 'A b'.split() }}|{{ ' x '.strip() ~ 1 ~ none }}|{{ 'abc'[::-1] }}|{{ messages[1:] | length }}|{{ undefined_thing }}|{{ x is defined }}
{% set block %}in {{ ns.n }}{% endset %}{{ block | indent(2, first=true) }}|{{ messages[0].content.replace('l', 'L').title() }}
{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'b': 1}.items() %}{{ k }}{% endfor %}
{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}q{% endcall %}{{ [1, 2, 3] | sum }}{{ ['a', 'b'] | first }}{{ 3.14159 | round(2) }}{{ '5' | int + 1 }}{{ none | default('d', true) }}
{% if 'ell' in messages[0].content and messages[0].role in ['user'] and not (1 < 2 < 2) %}yes{% else %}no{% endif %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('/') }}{{ joiner(',')() }}{{ dict(a=1).get('a') }}
{{ ['x', 'y'] | batch(2) | list }}{{ '<&>' | e }}{{ "a\\nb".splitlines() }}{{ range(3) | list }}{{ 'x' | center(5) }}{{ cycler(1, 2).next() }}"""


def test_what_jinja_offers_means_the_same_here(theirs) -> None:
    how = {"tokenize": False, "chat_template": SAYINGS}
    assert ours(SAYINGS, TALKS["many"][0]) == theirs.apply_chat_template(TALKS["many"][0], **how)


def test_the_day_is_that_on_which_the_template_was_read_first(theirs) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}"
    assert ours(template, ONE) == theirs.apply_chat_template(ONE, tokenize=False, chat_template=template)
    assert ours("{{ strftime_now('%f') }}", ONE) == ours("{{ strftime_now('%f') }}", ONE)


def test_threads_do_not_disturb_each_other() -> None:
    template = "{% for m in messages %}{% for i in range(200) %}{{ m.content }}{% endfor %}{% endfor %}"
    found: dict[int, set[str]] = {number: set() for number in range(4)}

    def work(number: int) -> None:
        for _ in range(20):
            found[number].add(ours(template, [{"role": "user", "content": str(number)}]))

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {str(number) * 200} for number in found}


def test_what_a_template_objects_to_is_about_the_row_and_what_it_is_about_all() -> None:
    with pytest.raises(UserError, match="no robots") as refused:
        ours("{{ raise_exception('no robots') }}", ONE)
    assert refused.value.__cause__ is not None
    for template in ("{% for m in messages %}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 10 ** 12 }}"):
        with pytest.raises(UserError, match="the chat template is refused") as refused:
            ours(template, ONE)
        assert refused.value.__cause__ is None, "every row would be told of"


@pytest.mark.parametrize(("messages", "said"), [
    (CALLING, "message 2 (assistant) holds no text but tool_calls, and the template writes text alone"),
    ([{"role": "user", "content": None}], "message 1 (user) holds no plain text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 1 (user) holds no plain text"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_conversation_that_a_template_does_not_reckon_with_is_named_in_plain_words(
    name: str, messages, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        ours((templates.FOLDER / f"{name}.jinja").read_text(), messages)
    assert refused.value.__cause__ is not None, "it is about the row alone"
    assert said in str(refused.value) and "attribute" not in str(refused.value)
    with pytest.raises(UserError, match=r"it fails over it \(ZeroDivisionError: "):
        ours("{{ 1 // 0 }}", ONE)


@pytest.mark.parametrize("name", sorted(templates.MARKS.keys() - {"qwen"}))
def test_what_a_named_template_cannot_write_is_never_left_out(name: str) -> None:
    template = (templates.FOLDER / f"{name}.jinja").read_text()
    for message in (CALLING[1], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}):
        with pytest.raises(UserError, match=r"message 2 \(assistant\) holds no") as refused:
            ours(template, [ONE[0], message])
        assert ("model.chat_template=qwen" in refused.value.faults[0].cure) == ("tool_calls" in message)


METHODS = Guards(Budget()).methods()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("around", [
    "{% for m in messages %}{{ CALL }}{% endfor %}",
    "{% macro say(m) %}{{ CALL }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% block b %}{% set m = messages[0] %}{{ CALL }}{% endblock %}",
])  # fmt: skip
def test_every_method_is_called_within_loops_macros_and_blocks_as_in_jinja(method: str, around: str, theirs) -> None:
    given = {"replace": "'l', 'L'", "zfill": "9", "center": "30", "ljust": "30", "rjust": "30", "rpartition": "'l'"}
    given |= {"rfind": "'l'", "rindex": "'l'", "split": "'l', maxsplit=1", "rsplit": "sep='l', maxsplit=1"}
    template = around.replace("CALL", f"m.content.{method}({given.get(method, '')})")
    talk = TALKS["many"][0][:1]
    assert ours(template, talk) == theirs.apply_chat_template(talk, tokenize=False, chat_template=template)


WORKING = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}
{% if m.content.rfind('<think>') < 0 and '<x>' not in m.content and not m.content.startswith('y') %}{% set ns.n = ns.n + 1 %}
{% endif %}{{ m.role | upper ~ ': ' + said | trim + '\n' }}{{ said.rpartition('#')[0] }}{{ m.content | replace('#', '') | length }}
{% endfor %}{{ messages | map(attribute='content') | map('length') | sum }}"""


@pytest.mark.parametrize("letter", ["a ", "ā "])
def test_a_long_row_is_written_within_what_it_may_cost(letter: str, theirs) -> None:
    talk = [{"role": "user", "content": letter * 2**20}, {"role": "assistant", "content": letter * 2**20}]
    assert ours(WORKING, talk) == theirs.apply_chat_template(talk, tokenize=False, chat_template=WORKING)
    many = [{"role": "user", "content": "Yes."}, {"role": "assistant", "content": "No."}] * 2_000
    assert ours(WORKING, many) == theirs.apply_chat_template(many, tokenize=False, chat_template=WORKING)


def test_what_a_rendering_may_make_follows_what_it_was_given() -> None:
    template = "{{ 'a' * 20000000 }}"
    with pytest.raises(UserError, match="32 times what it was given"):
        ours(template, ONE)
    assert len(ours(template, [{"role": "user", "content": "a" * 2_000_000}])) == 20_000_000


def test_the_characters_that_a_loop_goes_through_are_paid_for_before_it_begins() -> None:
    with pytest.raises(UserError, match="32 times what it was given"):
        ours("{% for c in 'a' * 1000000 %}{% break %}{% endfor %}", ONE)


@pytest.mark.parametrize("template", [
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages[0].content.rsplit(1, 2, 3) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "{% block b %}{{ self.b() }}{% endblock %}",
])  # fmt: skip
def test_what_is_wrong_with_every_row_is_not_told_of_each(template: str) -> None:
    with pytest.raises(UserError, match="the chat template is refused") as refused:
        ours(template, ONE)
    assert refused.value.__cause__ is None


def test_a_row_that_is_too_deep_is_not_the_templates_fault() -> None:
    deep: list = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(UserError, match="more than 64 deep") as refused:
        ours("{{ messages[0] | tojson }}", [{**ONE[0], "more": deep}])
    assert refused.value.__cause__ is not None


def test_an_unknown_name_tells_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"there is no chat template 'chatlm'.*Did you mean 'chatml'\?") as refused:
        templates.chosen("chatlm", ())
    assert all(name in refused.value.faults[0].cure for name in templates.MARKS)


def test_a_file_is_read_as_it_is(tmp_path) -> None:
    (tmp_path / "chatml").write_text("mine")
    assert templates.chosen(str(tmp_path / "chatml"), ()) == "mine"
    with pytest.raises(UserError, match="cannot be read"):
        templates.chosen(str(tmp_path), ())


def test_each_name_has_a_file_and_each_file_a_name() -> None:
    assert {file.stem for file in templates.FOLDER.iterdir()} == templates.MARKS.keys()
    for name, marks in templates.MARKS.items():
        text = (templates.FOLDER / f"{name}.jinja").read_text()
        made = ours(text, [*SYSTEM, *ONE], reply=True)
        assert all(mark in made for mark in marks), name
        assert all(message["content"].strip() in made for message in [*SYSTEM, *ONE])


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "phi3", "qwen"])
def test_marks_that_the_tokenizer_takes_to_pieces_are_refused_until_they_are_added(name: str, words) -> None:
    with pytest.raises(UserError, match=r"takes to pieces") as refused:
        HuggingFaceTokenizer(words, name)
    cure = refused.value.faults[0].cure
    marks = json.loads(cure[cure.index("[") : cure.index("]") + 1])
    assert marks == list(templates.MARKS[name])
    made = HuggingFaceTokenizer(words, name, new_tokens=marks)
    assert all(len(made.encode(mark)) == 1 for mark in marks)
    assert made.turn_end == made.encode(marks[-1])[0]
    assert made.stops == (made.eos_id, made.turn_end), "who generates stops at both"


def test_a_saved_tokenizer_keeps_the_named_template(words, tmp_path) -> None:
    made = HuggingFaceTokenizer(words, "plain")
    made.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == made.template
    again = HuggingFaceTokenizer(tmp_path / "saved")
    assert (again.template, again.fingerprint) == (made.template, made.fingerprint)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template(ONE, tokenize=False) == made.render(ONE)


def test_a_tokenizer_with_several_templates_uses_and_keeps_them(words, tmp_path) -> None:
    import shutil

    folder = shutil.copytree(words, tmp_path / "several")
    templates.save(folder, {"default": "plain", "tool_use": "with {{ tools[0].function.name }}"})
    made = HuggingFaceTokenizer(folder)
    assert (made.render(ONE), made.render(ONE, tools=[TOOL]), made.template) == ("plain", "with weather", "plain")
    made.save(tmp_path / "saved")
    again = HuggingFaceTokenizer(tmp_path / "saved")
    assert again.render(ONE, tools=[TOOL]) == "with weather"
    with pytest.raises(UserError, match="has the name"):
        templates.save(folder, {"default": "plain", "../up": "a"})
    assert not (tmp_path / "up.jinja").exists()


def test_servers_stop_at_the_turn_end_of_the_template(saved, tmp_path) -> None:
    from transformers import GenerationConfig

    marks = list(templates.MARKS["chatml"])
    settings = HuggingFaceSettings(path=str(saved("llama")), chat_template="chatml", new_tokens=marks)
    model = HuggingFace(settings)
    model.save_config(tmp_path)
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert stops == [model.tokenizer().eos_id, model.tokenizer().encode("<|im_end|>")[0]]
    assert HuggingFace(HuggingFaceSettings(path=str(saved("llama")), chat_template="plain")).tokenizer().turn_end in (
        None,
        model.tokenizer().eos_id,
    )


def test_a_tokenizer_whose_template_ends_turns_as_texts_end_stops_there_alone(words) -> None:
    for template in ("", "plain"):
        made = HuggingFaceTokenizer(words, template)
        assert made.stops == (made.eos_id,)
