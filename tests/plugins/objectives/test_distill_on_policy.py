"""Distillation on answers that the policy writes: which rows, what is drawn; no layout and no restart changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loomtune import api
from loomtune.batching import collate
from loomtune.contracts import Drawn, Sample, Sampling
from loomtune.errors import UserError
from loomtune.testing import check_objective
from loomtune.testing.toy import ToyTokenizer
from loomtune_plugins.objectives.distill import Distill
from loomtune_plugins.objectives.distill_on_policy import metrics
from loomtune_plugins.objectives.distill_settings import DistillSettings
from loomtune_plugins.objectives.sft import Sft
from loomtune_plugins.objectives.sft_settings import SftSettings
from runs.curves import LOSS, NORM, largest
from runs.worlds import Worlds
from runs.writing import distance, written

EOS = ToyTokenizer.eos_id
ROWS = [
    {"prompt": "a loom ", "completion": "weaves cloth"},
    {"messages": [{"role": "user", "content": "warp"}, {"role": "assistant", "content": "and weft"}]},
]


class Fake:
    """A run whose policy answers each prompt with what it is told to. asked: each call's prompts and sampling."""

    def __init__(self, *answers: Sequence[int], step: int = 1, max_length: int = 64) -> None:
        self.settings, self.step, self.max_length = SimpleNamespace(seed=3), step, max_length
        self.tokenizer, self.events = ToyTokenizer(), self
        self.answers, self.asked, self.told = answers or ([9, EOS],), [], []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        self.asked.append((prompts, sampling))
        return [list(self.answers[i % len(self.answers)]) for i in range(len(prompts))]

    def tell(self, event: str, **arguments: Any) -> None:
        self.told.append((event, arguments))


def objective(share: float = 1.0, **settings: Any) -> Distill:
    return Distill(DistillSettings(on_policy=share, **settings))


def sample(row: Mapping[str, Any], made: Distill, max_length: int = 64) -> Sample:
    return made.sample(row, ToyTokenizer(), max_length)


def visited(made: Distill, run: Fake, count: int = 1, row: Mapping[str, Any] = ROWS[0]) -> list[Sample]:
    own = sample(row, made, run.max_length)
    (step,) = made.experience(run, [Drawn(i, own) for i in range(count)])  # type: ignore[arg-type]
    return list(step)


def parts(one: Sample) -> tuple[list[int], list[int]]:
    """The tokens that are no targets, and those that are."""
    (segment,) = one.segments
    return segment.tokens[~segment.is_target].tolist(), segment.tokens[segment.is_target].tolist()


def test_it_keeps_the_contract() -> None:
    check_objective(objective(0.5), ROWS)


def test_without_a_share_nothing_is_otherwise() -> None:
    made, plain, run = objective(0.0), Sft(SftSettings()), Fake()
    own = sample(ROWS[0], made)
    assert not own.numbers and made.fingerprint() == plain.fingerprint()
    assert parts(own) == parts(plain.sample(ROWS[0], ToyTokenizer(), 64))
    assert visited(made, run, 2)[1].numbers == {} and not run.asked
    assert metrics(collate([own], [0], 0)) == {}


def test_an_answer_of_the_policy_is_learned_to_its_end_token_and_a_cut_one_has_none() -> None:
    run = Fake([40, 41, EOS], [40, 41, 42], [])
    whole, cut, nothing = visited(objective(), run, 3)
    before = ToyTokenizer().encode("a loom ")
    assert [parts(one)[0][-7:] for one in (whole, cut, nothing)] == [before] * 3
    assert [parts(one)[1] for one in (whole, cut, nothing)] == [[40, 41, EOS], [40, 41, 42], []]
    assert [one.numbers["ended"] for one in (whole, cut, nothing)] == [1, 0, 0]
    share, length, ended = metrics(collate([whole, cut, nothing], range(3), 0)).values()
    assert [*map(float, share + length + ended)] == [3, 3, 6, 3, 1, 3]


def test_an_answer_may_end_with_the_turn() -> None:
    class Turns(ToyTokenizer):
        stops = (EOS, 42)

    run = Fake([40, 42], [40, 41])
    run.tokenizer = Turns()
    turn, cut = visited(objective(), run, 2)
    assert run.asked[0][1].stop == (EOS, 42)
    assert [one.numbers["ended"] for one in (turn, cut)] == [1, 0] and parts(turn)[1] == [40, 42]


def test_an_answer_is_asked_for_as_the_settings_say_and_told() -> None:
    run = Fake([40, EOS], step=5, max_length=50)
    made = objective(max_new_tokens=7, sampling_temperature=0.4)
    visited(made, run)
    ((prompts, sampling),) = run.asked
    assert prompts == [made.prompt(ROWS[0], ToyTokenizer())]
    assert sampling == Sampling(max_tokens=7, max_length=50, temperature=0.4, stop=(EOS,))
    ((event, told),) = run.told
    assert event == "rollout_finished" and told["step"] == 5
    assert told["samples"] == [{"prompt": "a loom ", "completion": "%"}]


def places(run: Fake, share: float, count: int) -> list[int]:
    made = visited(objective(share), run, count)
    return [i for i, one in enumerate(made) if one.numbers["on_policy"]]


def test_which_rows_the_policy_answers_depends_on_seed_step_and_place_alone() -> None:
    first = places(Fake(), 0.3, 400)
    assert 90 < len(first) < 150
    assert places(Fake(), 0.3, 400) == first
    assert places(Fake(), 0.3, 200) == [place for place in first if place < 200]
    assert set(first) < set(places(Fake(), 0.6, 400))
    assert places(Fake(step=2), 0.3, 400) != first
    other = Fake()
    other.settings.seed = 4
    assert places(other, 0.3, 400) != first
    assert places(Fake(), 1.0, 400) == list(range(400))


def test_rows_that_keep_their_answers_are_as_they_were() -> None:
    made = objective(0.3)
    own = sample(ROWS[0], made)
    for one in visited(made, Fake(), 20):
        assert one.numbers["on_policy"] or (parts(one) == parts(own) and one.numbers == own.numbers)


def test_what_is_learned_before_the_answer_is_learned_still() -> None:
    (everything,) = visited(objective(train_on="all"), Fake())
    assert parts(everything)[1] == [*ToyTokenizer().encode("a loom "), 9, EOS]
    talk = {"messages": [*ROWS[1]["messages"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    for turns, learned in (("all", [*ToyTokenizer().encode("assistant: and weft")[11:], 9, EOS]), ("last", [9, EOS])):
        (one,) = visited(objective(turns=turns), Fake(), row=talk)
        assert [token for token in parts(one)[1] if token != 13] == learned, "but for the blank that ends a turn"


def test_the_last_answer_is_replaced_also_where_a_question_comes_after_it() -> None:
    longer = {"messages": [*ROWS[1]["messages"], {"role": "user", "content": "which nobody answers"}]}
    run = Fake()
    assert [parts(visited(objective(), run, row=row)[0]) for row in (longer, ROWS[1])] == [
        (made := objective().prompt(ROWS[1], ToyTokenizer()), [9, EOS]),
        (made, [9, EOS]),
    ]


def test_a_prompt_that_fills_the_length_keeps_its_own_answer() -> None:
    talk = {"messages": [*ROWS[1]["messages"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    made = objective()
    length = len(made.prompt(talk, ToyTokenizer()))
    run = Fake(max_length=length)
    (one,) = visited(made, run, row=talk)
    assert not one.numbers["on_policy"] and one.targets and not run.asked
    assert visited(made, Fake(max_length=length + 1), row=talk)[0].numbers["on_policy"]


@pytest.mark.parametrize(
    ("row", "told"),
    [({"text": "plain"}, "plain text without a prompt"), ({"prompt": "", "completion": "x"}, "has an empty prompt")],
)
def test_a_row_that_asks_nothing_is_refused(row: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sample(row, objective(bos="never"))
    assert sample(row, objective(0.0, bos="never")).targets


def test_a_conversation_with_other_tokens_than_it_is_asked_with_is_refused() -> None:
    made = objective()
    own = sample(ROWS[1], made)
    assert made.on_policy is not None
    with pytest.raises(ValueError, match="than when asked"):
        made.on_policy.sample(own, ROWS[0], ToyTokenizer())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"on_policy": 1.5}, r"on_policy=1\.5 is no share"),
        ({"on_policy": 0.5, "max_new_tokens": 0}, "max_new_tokens=0 leaves no room"),
        ({"on_policy": 0.5, "sampling_temperature": -1.0}, r"sampling_temperature=-1\.0 is negative"),
        ({"on_policy": 0.5, "teacher_logits": "stored"}, "says nothing of the answers"),
        ({"max_new_tokens": 64}, "max_new_tokens=64 has no effect"),
        ({"sampling_temperature": 0.5}, r"sampling_temperature=0\.5 has no effect"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Distill(DistillSettings(**settings))


def test_without_an_engine_that_generates_the_run_is_refused(tiny: list[str]) -> None:
    with pytest.raises(UserError, match=r"(?s)on_policy=0\.5 has the policy write.*set rollout=huggingface"):
        api.check(api.compose([*tiny, "rollout=null", "sharding=single"]))
    without = [text for text in tiny if "on_policy" not in text and "max_new_tokens" not in text]
    api.check(api.compose([*without, "rollout=null", "sharding=single"]))


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro-batches of 3": (1, ["sharding=single", "batch.micro=3"]),
    "packed": (1, ["sharding=single", "packing=true"]),
    "ddp on 2": (2, ["sharding=ddp", "rollout.batch=2"]),
    "ddp, sequence 2": (2, ["sharding=ddp", "sharding.sequence=2"]),
    "fsdp on 2": (2, ["sharding=fsdp", "batch.micro=2"]),
    "fsdp, tensor 2": (2, ["sharding=fsdp", "sharding.tensor=2"]),
    "zero 3 on 2": (2, ["sharding=zero", "sharding.stage=3", "batch.micro=2"]),
}
EVERYDAY = ("micro-batches of 3", "ddp on 2")


@pytest.fixture(scope="module")
def tiny(tied_model: Path, tiny_model: Path, mixed_data: Path) -> list[str]:
    """A policy that writes half of the answers it learns from, some of them cut and some of them not."""
    models = [f"model.path={tied_model}", f"roles.teacher.model.path={tiny_model}"]
    writes = ["objective=distill", "objective.on_policy=0.5", "objective.max_new_tokens=16"]
    how = ["optimizer.lr=3e-3", "steps=3", "tracker=[jsonl]", "checkpoint.background=false"]
    return [*models, "data=jsonl", f"data.path={mixed_data}", *writes, *how]


@pytest.fixture(scope="module")
def alone(worlds: Worlds, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(*settings: str) -> dict[str, Any]:
        if settings not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[settings] = worlds.train(1, [*tiny, *settings, "sharding=single"], folder, work=written).result
        return made[settings]

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in LAYOUTS]
)
@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_every_layout_writes_the_same_answers_and_learns_the_same_of_them(
    layout: str, adapter: str, worlds: Worlds, alone: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    if adapter == "lora" and "tensor" in layout:
        pytest.skip("linear layers that are wrapped are not cut")
    size, how = LAYOUTS[layout]
    one = alone(f"adapter={adapter}")
    other = worlds.train(size, [*tiny, f"adapter={adapter}", *how], tmp_path / "run", work=written).result
    assert len(one["heard"]) > 10 and other["heard"] == one["heard"]
    for name, within in {"loss": LOSS, "grad_norm": NORM}.items():
        assert largest(*([line[name] for line in run["lines"]] for run in (other, one))) < within, name
    for name in ("tokens", "on_policy", "completions/mean_length", "completions/ended"):
        assert [line[name] for line in other["lines"]] == [line[name] for line in one["lines"]], name


def test_a_run_that_is_stopped_goes_on_with_what_it_would_have_written(
    worlds: Worlds, tiny: list[str], tmp_path: Path
) -> None:
    whole = worlds.train(1, [*tiny, "sharding=single"], tmp_path / "whole")
    worlds.train(1, [*tiny, "sharding=single", "stop_after=1"], tmp_path / "run")
    resumed = worlds.resume(1, tmp_path / "run")
    assert resumed.lines == whole.lines and len(whole.lines) == 3


@pytest.fixture(scope="module")
def decided(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is surer of itself than drawn weights are."""
    folder = tmp_path_factory.mktemp("decided") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_what_it_writes_a_policy_nears_its_teacher_more_when_that_is_what_it_learns_on(
    seed: int, worlds: Worlds, tiny: list[str], decided: Path, tmp_path: Path
) -> None:
    models = [text for text in tiny if text.startswith(("model", "data", "checkpoint"))]
    how = ["objective=distill", f"roles.teacher.model.path={decided}", "optimizer.lr=1e-2", "batch.size=16"]
    shared = [*models, *how, "objective.beta=1", "sharding=single", "steps=60", f"seed={seed}", "tracker=[]"]
    writes = ["objective.on_policy=1", "objective.max_new_tokens=16"]
    off, on = (
        worlds.train(1, [*shared, *more], tmp_path / name, work=distance).result
        for name, more in (("off", []), ("on", writes))
    )
    assert on["written"] < 0.8 * off["written"]
    assert on["own"] > off["own"], "which is what the other half of the answers is for"
