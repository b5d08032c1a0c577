"""What `make parity` trains: every objective, on rows of its own, and how far its runs may be apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oasst
from runs.curves import LOSS
from support import SHARED, write_rows

MODEL = SHARED / "models" / "stories260k"
SIZE = 8
PAIRS = ("logps/chosen", "logps/rejected")
CANCELS = 1e-5
NEAR_0 = """With `optimizer.eps=1e-6`: where a gradient is near 0, the step that Adam takes with its default of 1e-8 is
decided by rounding, and on these rows that alone moved rewards by 2e-5 of the largest."""
WHY = """The loss is of a difference of differences of sums of log-probabilities, in which most of them cancels: one
unit in the last place of a single weight at the start gives 1.5e-6 in the loss here, 2.2e-6 in the gradient norm and
1e-7 in the sums."""


@dataclass(frozen=True)
class Case:
    """What is learned.

    rows: which of the files of `write`. seen: means that are logged beside the loss, of which the differences are
    relative to the largest value. answers: whether a row has several answers to one prompt. loss: the bound of its
    relative differences. why: what the page says of that bound.
    """

    name: str
    rows: str
    settings: str
    steps: int = 12
    seen: tuple[str, ...] = ()
    answers: bool = False
    loss: float = LOSS
    why: str = ""


SFT = Case("sft", "gsm8k", "objective=sft data.prompt=question data.completion=answer optimizer.lr=1e-3", steps=40)
LEARNED = (
    Case("dpo", "pairs", "objective=dpo", seen=PAIRS, answers=True, loss=CANCELS, why=WHY),
    # A reference that is stored is the same file in every layout; these read it where they are.
    Case("dpo ipo", "pairs", "objective=dpo loss=[ipo] objective.reference=live", seen=PAIRS, answers=True),
    Case(
        "dpo with sft",
        "pairs",
        "objective=dpo loss=[sigmoid,sft] loss.sft.weight=0.1",
        seen=PAIRS,
        answers=True,
        loss=CANCELS,
        why=WHY,
    ),
    Case("kto", "labels", "objective=kto", seen=(*PAIRS, "kl"), answers=True),
    Case(
        "dpo with kl",
        "pairs",
        "objective=dpo loss=[sigmoid,kl] loss.kl.weight=0.1",
        seen=PAIRS,
        answers=True,
        loss=CANCELS,
        why=WHY,
    ),
    Case("orpo", "pairs", "objective=orpo", seen=PAIRS, answers=True),
    Case("simpo", "pairs", "objective=simpo", seen=PAIRS, answers=True),
    Case("cpo", "pairs", "objective=cpo", seen=PAIRS, answers=True),
    Case(
        "reward",
        "pairs",
        "objective=reward optimizer.eps=1e-6",
        seen=("rewards/chosen", "rewards/rejected"),
        answers=True,
        why=NEAR_0,
    ),
    Case("distill", "answers", "objective=distill roles.teacher.model.path={teacher}", seen=("kl", "entropy")),
    Case("pretrain", "texts", "objective=pretrain"),
)


def settings(case: Case, folder: Path) -> list[str]:
    """The run, whose layout alone changes, on the files of a folder."""
    rows = ["data=jsonl", f"data.path={folder / case.rows}.jsonl"]
    run = [f"steps={case.steps}", f"batch.size={SIZE}", "tracker=[jsonl]", "guard=[]", "checkpoint.background=false"]
    how = ["optimizer.lr=3e-4", "max_length=100"] if case in LEARNED else []
    return [f"model.path={MODEL}", *rows, *run, *how, *case.settings.format(teacher=folder / "teacher").split()]


def write(folder: Path) -> None:
    """The rows of every case, each of which is met once, and a teacher."""
    found = oasst.pairs((20, 110), (20, 60))
    pairs = found[:: len(found) // (LEARNED[0].steps * SIZE)]
    answers = [{"prompt": pair["prompt"], "completion": pair[key]} for pair in pairs for key in ("chosen", "rejected")]
    # More wanted answers than others: likelihoods rise, and with them KTO's z0, which is never below 0.
    labels = [{**row, "label": number % 4 > 0} for number, row in enumerate(answers[::3])]
    files: Mapping[str, Sequence[Mapping[str, Any]]] = {
        "gsm8k": _sums(SFT.steps * SIZE),
        "pairs": pairs,
        "answers": answers,
        "labels": labels,
        "texts": [{"text": pair["prompt"] + pair["chosen"]} for pair in pairs],
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    _neighbour(folder / "teacher")


def _sums(count: int) -> list[dict[str, str]]:
    """Rows of GSM8K of mixed lengths, some 90 to 300 tokens."""
    source = SHARED / "data" / "gsm8k" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    return [row for row in rows if len(row["question"]) + len(row["answer"]) < 420][:count]


def _neighbour(folder: Path) -> None:
    """Saves the model with every weight a little off: what it says is not what the model says already."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    draw, file = torch.Generator().manual_seed(0), folder / "model.safetensors"
    weights = {name: w + 0.2 * w.std() * torch.randn(w.shape, generator=draw) for name, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
