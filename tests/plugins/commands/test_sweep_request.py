"""What is typed behind `loomtune train -m`: Hydra's words apart from the items', and nothing without effect."""

from __future__ import annotations

import pytest

from loomtune.errors import UserError
from loomtune.settings import ROOT_KEYS
from loomtune_plugins.commands.sweeps.goal import Goal, chosen
from loomtune_plugins.commands.sweeps.items import Item
from loomtune_plugins.commands.sweeps.pruning import LEAST, hopeless
from loomtune_plugins.commands.sweeps.request import Request, first, fixed, label, spread


def test_hydra_s_words_are_told_from_those_of_the_items() -> None:
    request = Request.read(["seed=0,1", "hydra/sweeper=optuna", "+hydra.sweeper.params.a=1", "steps=2"])
    assert request.words == ("seed=0,1", "steps=2")
    assert request.hydra == ("hydra/sweeper=optuna", "+hydra.sweeper.params.a=1")
    assert request.set_by_hand("hydra.sweeper.params.a") and not request.set_by_hand("hydra.sweep.dir")
    assert "hydra" not in ROOT_KEYS


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra.verbose=true", "without effect"),
        ("hydra/launcher=basic", "without effect"),
        ("hydra.sweep.subdir=x", "without effect"),
        ("hydra.sweeper.sampler._target_=os.system", "names code to call"),
        ("hydra.sweeper.custom_search_space=os.system", "names code to call"),
        ("run.dir=here", "the folder of every item"),
        ("~adapter", "takes a key away"),
        ("a=b=[", "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Request.read(["seed=0,1", word])


def test_a_key_that_is_set_twice_is_refused_because_a_sweeper_would_drop_one() -> None:
    with pytest.raises(UserError, match="seed is set 2 times"):
        Request.read(["seed=0,1", "seed=2"])


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        Request.read(["run.dir=x", "hydra.verbose=true", "~data"])
    assert len(refused.value.faults) == 3


def test_one_item_stands_for_all() -> None:
    words = [
        "seed=3,4",
        "optimizer.lr=tag(log,interval(1e-5,1e-2))",
        "steps=range(4,9)",
        "loss=[a,b],[c]",
        "run.name='x,y'",
    ]
    assert first(words) == ["seed=3", "optimizer.lr=1e-05", "steps=4", "loss=[a,b]", "run.name='x,y'"]


def test_a_glob_is_the_list_of_what_can_be_chosen() -> None:
    (word, other) = spread(["optimizer=glob(*,exclude=sgd)", "run.name='a,b',c"])
    assert {"adamw", "adamw_8bit"} <= set(word.removeprefix("optimizer=").split(",")) and "sgd" not in word
    assert other == "run.name='a,b',c" and first(["adapter=glob(lo*)", "seed=1,2"]) == ["adapter=lora", "seed=1"]
    for word, said in (("adapter=glob(nobody*)", "can be chosen: .*lora"), ("seed=glob(*)", "only an axis")):
        with pytest.raises(UserError, match=said):
            spread([word])


def test_an_item_is_told_by_what_sets_it_apart() -> None:
    same = fixed(["steps=2", "seed=0,1"])
    assert same == {"steps"}
    assert label(["steps=2", "seed=1"], same) == "seed=1"
    assert label(["steps=2"], same) == "steps=2"
    assert label(["a=b\nc"], ()) == repr("a=b\nc")


def test_an_item_is_found_by_its_overrides_in_any_order(tmp_path: object) -> None:
    one, other = (Item(tmp_path, words, Goal()) for words in (("a=1", "b=2"), ("b=2", "a=1")))
    assert one.name == other.name != Item(tmp_path, ("a=1", "b=3"), Goal()).name


def test_a_metric_that_does_not_say_which_way_is_better_is_refused() -> None:
    with pytest.raises(UserError, match=r"hydra\.launcher\.mode=max, or min"):
        chosen("sql_accuracy", "", "", None)
    assert chosen("sql_accuracy", "max", "", None) == Goal("sql_accuracy", "max")
    assert chosen("sql_accuracy", "", "maximize", None) == Goal("sql_accuracy", "max")
    assert chosen("heldout_loss", "", "", None) == Goal("heldout_loss", "min")
    with pytest.raises(UserError, match="contradict each other"):
        chosen("loss", "max", "minimize", None)
    with pytest.raises(UserError, match="unknown"):
        chosen("loss", "biggest", "", None)


def test_what_is_not_finite_counts_as_the_worst() -> None:
    lines = [{"step": 0, "loss": 9.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "nonfinite": ["loss"]}]
    assert Goal().curve(lines) == {1: 2.0, 2: float("inf")}
    assert Goal("loss", "max").curve(lines)[2] == float("-inf")
    assert sorted([None, 1.0, float("nan"), 0.5], key=Goal().rank)[:2] == [0.5, 1.0]


def test_the_median_rule_compares_at_the_same_step_and_with_enough_others() -> None:
    others = [{4: value, 8: 0.0} for value in (1.0, 2.0, 3.0)]
    assert len(others) == LEAST
    assert hopeless({4: 2.5}, others, 4, Goal())
    assert not hopeless({4: 2.0}, others, 4, Goal()), "as good as the median"
    assert not hopeless({4: 2.5}, others, 5, Goal()), "too early"
    assert not hopeless({4: 2.5}, others[1:], 4, Goal()), "too few others"
    assert not hopeless({5: 2.5}, others, 4, Goal()), "none of the others was measured there"
    assert hopeless({4: 1.5}, others, 4, Goal("loss", "max"))
    assert not hopeless({}, others, 0, Goal())
