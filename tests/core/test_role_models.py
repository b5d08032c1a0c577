"""Models of roles beside the policy: what may be said of them, and who gets which."""

from __future__ import annotations

from pathlib import Path

import pytest

from loomtune import api, role_models
from loomtune.assembly import assemble
from loomtune.catalogue import installed
from loomtune.errors import UserError
from loomtune.lease import Lease
from loomtune.plan import Plan
from loomtune.testing import toy
from loomtune_plugins.adapters.full import Full


@pytest.fixture
def given(tied_model: Path, mixed_data: Path) -> list[str]:
    data = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}"]
    return [*data, "objective=distill", "sharding=single"]


def refusal(overrides: list[str]) -> str:
    with pytest.raises(UserError) as refused:
        api.check(api.compose(overrides))
    return str(refused.value)


def test_a_role_has_the_settings_of_the_policys_model_but_for_those_given(given: list[str], tiny_model: Path) -> None:
    plan = api.compose([*given, "model.attention=eager", f"roles.teacher.model.path={tiny_model}"])
    (teacher,) = role_models.models(plan, installed()).values()
    assert teacher._settings.path == str(tiny_model) and teacher._settings.attention == "eager"
    assert Plan.parse(plan.dump()).root.roles == {"teacher": {"model": {"path": str(tiny_model)}}}


def test_another_teacher_is_another_run(given: list[str], tiny_model: Path, tied_model: Path) -> None:
    hashes = {api.compose([*given, f"roles.teacher.model.path={path}"]).hash for path in (tiny_model, tied_model)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("roles.teecher.model.path=x", "objective=distill has no role 'teecher'. Did you mean 'teacher'?"),
        ("roles.teacher.model.pth=x", "there is no setting 'roles.teacher.model.pth'. Did you mean 'path'?"),
        ("roles.teacher.modl.path=x", "there is no setting 'roles.teacher.modl'. Did you mean 'model'?"),
        ("roles.teacher=x", "there is no setting 'roles.teacher'"),
        ("roles.teacher.model=x", "there is no setting 'roles.teacher.model.x'"),
        ("roles.teacher.model.new_tokens=7", "roles.teacher.model: "),
        ("roles.policy.model.path=x", "roles.policy is what is trained"),
        ("seed=1", "objective=distill needs a model as its teacher"),
    ],
)
def test_what_fits_no_role_is_told_with_what_was_meant(given: list[str], override: str, told: str) -> None:
    assert told in refusal([*given, override])


def test_a_model_that_is_not_there_is_told(given: list[str]) -> None:
    assert "nowhere" in refusal([*given, "roles.teacher.model.path=nowhere/at/all"])


def test_a_twin_takes_no_model_and_an_objective_of_one_role_none_at_all(given: list[str], tiny_model: Path) -> None:
    settings = {text.partition("=")[0]: text for text in given}
    twin = [*{**settings, "objective": "objective=sft"}.values(), f"roles.teacher.model.path={tiny_model}"]
    assert "objective=sft has no role 'teacher'" in refusal(twin)


def test_the_teacher_is_frozen_whole_and_its_own_engine(given: list[str], tiny_model: Path, tmp_path: Path) -> None:
    overrides = [*given, "adapter=lora", f"roles.teacher.model.path={tiny_model}", f"run.dir={tmp_path / 'run'}"]
    plan = api.compose(overrides)
    folder = api.prepare(plan)
    assembly = assemble(plan, folder, installed(), toy.world(), Lease(folder, "here"))
    assembly.build_roles()
    policy, teacher = (assembly.run.roles[name].engine for name in ("policy", "teacher"))
    assert teacher is not policy and teacher.spec.optimizer is None and isinstance(teacher.spec.adapter, Full)
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert assembly.run.trained_engines() == [policy]


def test_a_teacher_that_reads_fewer_tokens_than_rows_have_is_refused(given: list[str], tiny_model: Path) -> None:
    plan = api.compose([*given, f"roles.teacher.model.path={tiny_model}"])
    others = role_models.models(plan, installed())
    tokenizer = others["teacher"].tokenizer()
    role_models.suit(others, tokenizer, others["teacher"].context())
    with pytest.raises(UserError, match="and rows have up to"):
        role_models.suit(others, tokenizer, others["teacher"].context() + 1)
