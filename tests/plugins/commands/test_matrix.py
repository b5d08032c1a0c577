"""What goes with what: computed from offers, and never another answer than a run's own checks give."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from loomtune import api, cli
from loomtune.catalogue import installed
from loomtune.compose import compose
from loomtune.errors import UserError
from loomtune.offers import Trait
from loomtune_plugins.commands.cells import VARIED, Cell, cells
from loomtune_plugins.commands.matrix import shown
from support import ROOT, write_rows

CELLS = list(cells())
REFUSED = [cell for cell in CELLS if cell.status == "refused"]


def name_of(cell: Cell) -> str:
    return " x ".join(choice.label for choice in cell.choices.values())


def named(cell: Cell) -> list[str]:
    """What the user says of a role that has a model of its own, and of files of data; the matrix asks for neither."""
    teacher = ["roles.teacher.model.attention=sdpa"] if cell.choices["objective"].label == "distill" else []
    return [*teacher, *([f"data.path={rows_file()}"] if "data=jsonl" in cell.typed else [])]


@cache
def rows_file() -> Path:
    """Rows with whatever an objective may need."""
    row = {"prompt": "warp ", "completion": "and weft", "label": True, "text": "a loom"}
    return write_rows(Path(mkdtemp()) / "rows.jsonl", [row, {**row, "label": False}])


def some(all_of: list[Cell], told: Callable[[Cell], Iterable[object]]) -> list[Any]:
    """Every cell, for tests; one that tells nothing new after those before it is slow, for each is composed."""
    known: set[object] = set()
    made = []
    for cell in all_of:
        new = set(told(cell)) - known
        known |= new
        made.append(pytest.param(cell, id=name_of(cell), marks=() if new else pytest.mark.slow))
    return made


def chosen(cell: Cell) -> list[object]:
    return [(axis, choice.label) for axis, choice in cell.choices.items()]


def faults(cell: Cell) -> list[object]:
    """Its choices, and all that is held against it at once."""
    return [*chosen(cell), frozenset(fault.what for fault in cell.faults)]


def reasons(cell: Cell) -> list[object]:
    return [fault.what for fault in cell.faults]


def own(offer: str, axis: str = "sharding") -> list[str]:
    return [label for label in dict.fromkeys(c.choices[axis].label for c in CELLS) if label.split()[0] == offer]


def test_every_offer_of_three_axes_is_combined_with_every_other() -> None:
    labels = [list(dict.fromkeys(cell.choices[axis].label for cell in CELLS)) for axis in VARIED]
    assert [name_of(cell) for cell in CELLS] == [" x ".join(names) for names in itertools.product(*labels)]
    for axis, found in zip(VARIED, labels, strict=True):
        assert {label.split()[0] for label in found} == set(installed().names(axis))


def test_each_variant_has_a_row_and_one_that_is_the_default_anyway_names_it() -> None:
    assert own("fsdp") == ["fsdp", "fsdp hsdp", "fsdp offload", "fsdp tensor", "fsdp sequence"]
    assert own("zero") == ["zero stage 1", "zero stage 2", "zero stage 3", "zero offload", "zero sequence"]
    for entry in (one for axis in VARIED for one in installed().entries(axis)):
        rows = own(entry.offer.name, entry.axis.name)
        assert {f"{entry.offer.name} {variant}" for variant in entry.offer.variants} <= set(rows)


def test_strategies_of_one_process_get_one() -> None:
    for cell in CELLS:
        many = Trait.MANY_PROCESSES in cell.choices["sharding"].entry.offer.provides
        assert cell.processes == (2 if many else 1)


@pytest.mark.parametrize("cell", some(CELLS, chosen))
def test_a_cell_is_what_hydra_makes_of_its_overrides(cell: Cell) -> None:
    plan = compose(cell.typed)
    for axis, choice in cell.choices.items():
        assert dict(plan.chosen(axis)) == choice.settings


@pytest.mark.parametrize("cell", some(CELLS, faults))
def test_a_cell_says_what_the_checks_of_a_run_say(cell: Cell) -> None:
    plan = api.compose([*cell.typed, *named(cell)], processes=cell.processes)
    told = [(fault.what, fault.cure) for fault in cell.faults]
    try:
        api.check(plan)
    except UserError as error:
        assert [(fault.what, fault.cure) for fault in error.faults] and sorted(told) == sorted(
            (fault.what, fault.cure) for fault in error.faults
        )
    else:
        assert cell.status == "works" and not told


@pytest.mark.parametrize("cell", some(REFUSED, reasons))
def test_training_a_refused_cell_ends_with_its_reason_and_exit_code_2(
    cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *cell.typed, f"launcher.procs={cell.processes}", f"run.dir={tmp_path / 'run'}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(fault.what in said and f"cure: {fault.cure}" in said for fault in cell.faults)
    assert not (tmp_path / "run").exists()


def test_overrides_hold_in_every_cell_and_a_choice_leaves_its_rows_alone() -> None:
    found = list(cells(["precision=bf16", "sharding=fsdp", "adapter=lora"]))
    assert [cell.choices["sharding"].label for cell in found] == own("fsdp") * len(installed().names("objective"))
    assert {cell.choices["adapter"].label for cell in found} == {"lora"}
    assert all("precision=bf16" in cell.typed for cell in found)


def test_a_world_that_does_not_divide_refuses_the_variants_that_need_it() -> None:
    found = {cell.choices["sharding"].label: cell for cell in cells(["adapter=full", "sharding=fsdp"], processes=3)}
    assert found["fsdp"].status == "works"
    (fault,) = found["fsdp hsdp"].faults
    assert fault.what == "3 processes cannot be divided by sharding.replicate=2"


def test_a_model_that_is_asked_about_must_suit_the_sharding() -> None:
    odd = ["model=llama_1m", "model.shape.num_key_value_heads=1", "adapter=full", "sharding=fsdp"]
    found = {cell.choices["sharding"].label: cell for cell in cells(odd)}
    assert found["fsdp"].status == "works"
    (fault,) = found["fsdp tensor"].faults
    assert "1 key and value heads cannot be dealt out to 2 ranks evenly" in fault.what


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("sharding=fsd", "no sharding is called 'fsd'. Did you mean 'fsdp'?"),
        ("sharding.offload=true", "sharding.offload"),
        ("batch.size=0", "batch.size=0 is less than 1"),
        ("optimiser=adamw", "there is no setting 'optimiser'"),
    ],
)
def test_what_holds_in_no_cell_is_a_mistake(override: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        list(cells([override]))
    assert what in caught.value.faults[0].what


def test_the_table_names_each_reason_once() -> None:
    lines = "\n".join(shown(CELLS))
    for fault in {fault for cell in CELLS for fault in cell.faults}:
        assert lines.count(f"] {fault.what}\n    cure: {fault.cure}") == 1
    for choice in {cell.choices["sharding"].typed for cell in CELLS}:
        assert f"\n{' '.join(choice)}  " in lines


def test_reasons_are_numbered_and_a_cell_may_have_several() -> None:
    found = list(cells(["sharding=fsdp"], processes=3))
    lines = list(shown(found))
    told = [line.split("] ")[0].lstrip("[") for line in lines if line.startswith("[")]
    assert told == [str(number + 1) for number in range(len({fault for cell in found for fault in cell.faults}))]
    tensor = next(line for line in lines if line.startswith("sharding=fsdp sharding.tensor=2 "))
    assert re.search(r"refused \[(\d)\] +refused \[\1,\d\]", tensor)


def test_the_command_prints_it_and_json_holds_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["matrix", "adapter=lora", "--processes", "4", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processes"] == 4
    assert found["cells"] == [cell.described() for cell in cells(["adapter=lora"], 4)]
    with pytest.raises(SystemExit):
        cli.main(["matrix"])
    assert capsys.readouterr().out.rstrip() == "\n".join(shown(CELLS)).rstrip()


def test_it_needs_no_heavy_library() -> None:
    program = "import sys; from loomtune_plugins.commands.cells import cells; list(cells()); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "deepspeed", "datasets", "wandb"} & set(ran.stdout.split())


def test_every_extra_of_a_built_in_is_one_that_the_package_declares() -> None:
    declared = metadata("loomtune").get_all("Provides-Extra")
    for entry in installed().entries():
        if entry.source.distribution == "loomtune":
            assert entry.offer.extra in ("", *declared)


def test_the_table_of_traits_in_the_documentation_is_complete() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    table = page[page.index("### Traits") : page.index("### Axes")]
    assert re.findall(r"^\| `([a-z_]+)` \| .{10,} \|$", table, re.MULTILINE) == [trait.value for trait in Trait]


def test_an_offer_s_variants_and_what_it_excludes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plugins", "sharding=fsdp"])
    assert re.search(r"variant: tensor +sharding.tensor=2", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["plugins", "sharding=fsdp", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["offers"]
    assert found["variants"]["hsdp"] == ["sharding.replicate=2"] and found["excludes"] == {}


ACME = '''
from dataclasses import dataclass
from loomtune import hookimpl
from loomtune.offers import Offer, Trait
from loomtune.plan import Finding
from loomtune.settings import option
from loomtune_plugins.objectives.sft_settings import SftSettings

@dataclass
class Nothing:
    """Nothing to set."""

@dataclass
class Knots:
    """Knots."""
    knots: int = option(3, "how many")

@dataclass
class Asking:
    """What has no default."""
    path: str = option("???", "where it lies")

FULL = "loomtune_plugins.adapters.full:Full"

@hookimpl
def datas():
    return [Offer(name="cloth", build="acme_plugin:Cloth", schema=Nothing, summary="cloth",
                  provides=frozenset({"completions", "acme:cloth"}))]

@hookimpl
def objectives():
    sft, needs = "loomtune_plugins.objectives.sft:Sft", frozenset({"acme:cloth"})
    return [Offer(name="drape", build=sft, schema=SftSettings, summary="drapes", needs=needs),
            Offer(name="torn", build=sft, schema=Nothing, summary="its class asks for settings that it has not")]

@hookimpl
def adapters():
    alone = {Trait.MANY_PROCESSES: "it keeps its thread in one process"}
    return [
        Offer(name="thread", build=FULL, schema=Knots, summary="threads", excludes=alone,
              variants={"loose": ("adapter.knots=1",), "tight": ("adapter.knots=3",)}),
        Offer(name="quick", build="not_there_at_all:Quick", schema=Nothing, summary="quick", extra="fast"),
        Offer(name="asking", build=FULL, schema=Asking, summary="asks"),
    ]

@hookimpl
def preflight(plan, provided):
    if plan.choices("adapter").get("thread", {}).get("knots") == 1 and "fsdp" in provided.get(Trait.MANY_PROCESSES, ""):
        return [Finding("one knot does not hold " + provided[Trait.MANY_PROCESSES], "set adapter.knots=2")]
    return []
'''


PROGRAM = """
import contextlib, io, json, sys
from loomtune import cli

def answer(command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(command)
        except SystemExit as ended:
            return {"code": ended.code, "out": out.getvalue(), "err": err.getvalue()}

print(json.dumps([answer(command) for command in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line, given several commands, where a third party with a vocabulary of its own is installed."""
    folder = tmp_path_factory.mktemp("acme")
    (folder / "acme_plugin.py").write_text(ACME)
    info = folder / "loomtune_acme-4.5.dist-info"
    info.mkdir()
    head = "Metadata-Version: 2.1\nName: loomtune-acme\nVersion: 4.5\nProvides-Extra: fast\n"
    (info / "METADATA").write_text(head + "Requires-Dist: not-there-at-all>=2 ; extra == 'fast'\n")
    (info / "entry_points.txt").write_text("[loomtune]\nacme = acme_plugin\n")

    def run(*commands: list[str]) -> list[dict[str, Any]]:
        program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        ran = subprocess.run(program, env=env, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        answers: list[dict[str, Any]] = json.loads(ran.stdout)
        return answers

    return run


@pytest.fixture(scope="module")
def theirs(acme: Any) -> dict[tuple[str, ...], Any]:
    """Its cells by their labels."""
    (answer,) = acme(["matrix", "--json"])
    assert answer["code"] == 0, answer["err"]
    return {tuple(cell[axis] for axis in VARIED): cell for cell in json.loads(answer["out"])["cells"]}


def whats(cell: dict[str, Any]) -> list[str]:
    return [reason["what"] for reason in cell["reasons"]]


def test_a_third_party_s_offers_are_in_it_under_its_own_vocabulary(theirs: dict[tuple[str, ...], Any]) -> None:
    ours = set(installed().names("adapter"))
    assert {names[1] for names in theirs} - ours == {"thread loose", "thread tight", "quick", "asking"}
    assert whats(theirs["drape", "full", "single"]) == [
        "objective=drape needs `acme:cloth`, which nothing chosen provides"
    ]


def test_a_third_party_s_exclusion_hook_extra_missing_value_and_failure_are_told(
    theirs: dict[tuple[str, ...], Any],
) -> None:
    assert theirs["sft", "thread tight", "single"]["status"] == "works"
    excluded = "adapter=thread does not go with sharding={}: it keeps its thread in one process"
    assert whats(theirs["sft", "thread tight", "ddp"]) == [excluded.format("ddp")]
    knot = "one knot does not hold sharding=fsdp"
    assert whats(theirs["sft", "thread loose", "fsdp"]) == [excluded.format("fsdp"), knot]
    quick = theirs["sft", "quick", "fsdp"]
    assert (quick["status"], quick["extras"]) == ("needs", ["loomtune-acme[fast]"])
    assert theirs["drape", "quick", "fsdp"]["status"] == "refused", "an extra alone would not mend it"
    assert "adapter=asking does not stand by itself" in whats(theirs["sft", "asking", "single"])[0]
    assert "objective=torn cannot be made: AttributeError" in whats(theirs["torn", "full", "single"])[0]


def test_a_third_party_s_refused_cells_are_refused_as_runs(
    theirs: dict[tuple[str, ...], Any], acme: Any, tmp_path: Path
) -> None:
    refused = [("thread tight", "ddp"), ("thread loose", "fsdp"), ("quick", "fsdp")]
    found = [*(theirs["sft", *labels] for labels in refused), theirs["drape", "full", "ddp"]]
    asked = [f"run.dir={tmp_path / 'run'}", "launcher.procs=2"]
    for cell, answer in zip(found, acme(*(["train", *cell["overrides"], *asked] for cell in found)), strict=True):
        assert answer["code"] == 2, answer["err"]
        for reason in cell["reasons"]:
            assert f"{reason['what']}\n    cure: {reason['cure']}" in answer["err"]
        assert "not_there_at_all" not in answer["err"], "what is not installed is not imported"
    assert not (tmp_path / "run").exists()


def test_what_a_third_party_s_offer_excludes_and_which_extra_it_needs_are_shown(acme: Any) -> None:
    thread, quick = acme(["plugins", "adapter=thread"], ["plugins", "adapter=quick"])
    assert "excludes: many_processes, because it keeps its thread in one process" in thread["out"]
    assert "extra: loomtune-acme[fast]" in quick["out"]


def test_a_third_party_s_need_is_met_by_the_data_that_provide_it(acme: Any) -> None:
    (answer,) = acme(["matrix", "--json", "data=cloth", "objective=drape", "adapter=full", "sharding=single"])
    assert [cell["status"] for cell in json.loads(answer["out"])["cells"]] == ["works"]
