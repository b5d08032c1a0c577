"""The list of mutations is in step with the code, with the tests that it names and with docs/testing.md."""

from __future__ import annotations

from pathlib import Path

import pytest

import mutations
from mutations import MUTATIONS, ROOT, Mutation


def each(mutation: Mutation) -> str:
    return mutation.name


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTATIONS) >= 15
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=each)
def test_a_mutation_changes_one_place_into_another_program(mutation: Mutation) -> None:
    assert mutations.misfit(ROOT, mutation) == ""
    changed = mutations.broken(ROOT, mutation)
    assert mutation.new in changed != (ROOT / mutation.file).read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=each)
def test_the_tests_that_a_mutation_names_exist(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text() if name else (ROOT / path).is_file()


def test_a_mutation_that_no_longer_fits_the_code_is_told(tmp_path: Path) -> None:
    moved = Mutation("moved", "", "moved.py", "was here", "is there", ())
    (tmp_path / "moved.py").write_text("nothing of it\n")
    assert "0 times, not once" in mutations.misfit(tmp_path, moved)
    (tmp_path / "moved.py").write_text("was here, was here\n")
    assert "2 times, not once" in mutations.misfit(tmp_path, moved)
    assert mutations.misfit(tmp_path / "elsewhere", moved)


def test_the_documented_table_is_that_of_the_command(tmp_path: Path) -> None:
    documented = ROOT / "docs" / "testing.md"
    copied = tmp_path / "testing.md"
    copied.write_text(documented.read_text())
    mutations.write_table(copied)
    cure = "renew it: python tests/mutations.py --write docs/testing.md"
    assert mutations.table() in documented.read_text(), cure
    assert copied.read_text() == documented.read_text(), cure


def test_only_a_failed_expectation_counts_as_noticed() -> None:
    assert mutations.unrelated("x\nE   ImportError: cannot import name\n1 failed")
    assert not mutations.unrelated("x\nE   assert 1 == 2\n1 failed in 1s")
    assert mutations.summary("a\n1 failed, 2 passed in 3s\n") == "1 failed, 2 passed in 3s"
