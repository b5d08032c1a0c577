"""Before a run that packs begins, the samples of a row are shown not to see each other; a leak is never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loomtune.contracts import Batch, Kernel, Sample
from loomtune.contracts.batch import NO_PARENT
from loomtune.errors import UserError
from loomtune.probe import check_isolation
from loomtune.run import Run
from loomtune.settings import BatchSettings, Settings
from loomtune.testing import toy
from toys import TEXTS, Online, Rows, Toy, TwoNetworks, made, sample

REFUSED = r"see each other with this model and kernel\n    cure: set packing=false"


class Leaking(Kernel):
    """Plain causal attention over the whole row: what comes without a mask of one's own."""

    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        length = batch.tokens.shape[1]
        return {"visible": torch.ones(length, length, dtype=torch.bool).tril()}


class Foreseeing(toy.ToyKernel):
    """Keeps samples apart, but for one token, which sees the last of the row."""

    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        visible = super().attention(batch, dtype)["visible"]
        visible[:, 0, -2] = True
        return {"visible": visible}


class Blind(toy.ToyModel):
    """Computes the same whatever the tokens are."""

    def hidden(self, module: Any, batch: Batch, attention: Any, extras: Any = None) -> torch.Tensor:
        same = SimpleNamespace(**{name: getattr(batch, name) for name in batch.__slots__})
        same.tokens = torch.zeros_like(batch.tokens)
        states: torch.Tensor = super().hidden(module, same, attention, extras)  # type: ignore[arg-type]
        return states


class Bent(toy.ToyModel):
    """Hidden states `(rows, length, width)` of the toy, changed one way after the other."""

    def __init__(self, *ways: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.ways = ways

    def hidden(self, module: Any, batch: Batch, attention: Any, extras: Any = None) -> torch.Tensor:
        states = super().hidden(module, batch, attention, extras)
        for way in self.ways:
            states = way(states)
        return states


def as_it_is(states: torch.Tensor) -> torch.Tensor:
    return states


def large(states: torch.Tensor) -> torch.Tensor:
    """One channel is a thousand times larger than the others, as in large Llamas."""
    return states * (1 + 999 * (torch.arange(states.shape[-1]) == 3))


def constant(states: torch.Tensor) -> torch.Tensor:
    """One channel holds a large number, whatever the tokens are."""
    return states + 1000 * (torch.arange(states.shape[-1]) == 3)


def neighbours(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Each token sees so much of the one before it, also where that is another sample's."""
    return lambda states: states + share * states.roll(1, dims=1)


def reordered(states: torch.Tensor) -> torch.Tensor:
    """The last digit of every number hangs on all the row's tokens, as where a kernel sorts tokens before it adds."""
    digit = torch.finfo(states.dtype).eps * torch.sin(1e4 * states.float().sum(1, keepdim=True)).sign()
    return (states.float() * (1 + digit)).to(states.dtype)


class Deaf(toy.ToyKernel):
    """Keeps all segments apart, also answers from their prompt."""

    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        return super().attention(replace(batch, parents=torch.full_like(batch.parents, NO_PARENT)), dtype)


def two_answers(text: str) -> Sample:
    """A prompt and two answers, which share it."""
    first, second, third = (sample(part).segments[0] for part in (text, text[::-1], text[1:]))
    return Sample((first, replace(second, parent=0), replace(third, parent=0)))


def sharing(folder: Path, share: str = "auto", **parts: Any) -> Run:
    """A run that packs nothing, of two answers to each prompt."""
    settings = Settings(batch=BatchSettings(share=share))
    rows = Rows(two_answers(text) for text in TEXTS)
    toy_run = made(folder, settings=settings, **{"splits": {"train": rows}, **parts})
    toy_run.assembly.build_roles()
    return toy_run.run


def packing(folder: Path, precision: str = "fp32", **parts: Any) -> Toy:
    toy_run = made(folder, settings=Settings(packing=True, precision=precision), **parts)
    toy_run.assembly.build_roles()
    return toy_run


def test_a_kernel_that_keeps_samples_apart_passes_and_nothing_of_the_probe_is_left(tmp_path: Path) -> None:
    probed = packing(tmp_path / "probed")
    before, drawn = probed.weights(), torch.random.get_rng_state()
    check_isolation(probed.run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in probed.weights().items())
    assert torch.equal(torch.random.get_rng_state(), drawn) and torch.is_grad_enabled()
    assert all(p.grad is None for p in probed.run.policy.engine.network.parameters())  # type: ignore[attr-defined]
    assert probed.train() == packing(tmp_path / "not").train() == "completed"


@pytest.mark.parametrize("kernel", [Leaking(), Foreseeing()], ids=["leaks onward", "leaks backward"])
def test_a_kernel_that_leaks_is_refused_with_the_cure(kernel: Kernel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(packing(tmp_path, kernel=kernel).run)


outliers = pytest.mark.parametrize("outlier", [as_it_is, large, constant])


@outliers
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_leak_of_a_hundredth_is_seen_in_fp32(share: float, outlier: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(packing(tmp_path, model=Bent(neighbours(share), outlier)).run)


@outliers
@pytest.mark.parametrize("kernel", [Leaking(), Foreseeing()], ids=["leaks onward", "leaks backward"])
def test_a_whole_leak_is_seen_in_bf16(kernel: Kernel, outlier: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(packing(tmp_path, "bf16", model=Bent(outlier), kernel=kernel).run)


@outliers
@pytest.mark.parametrize("noise", [as_it_is, reordered])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_large_channels_and_sums_in_another_order_are_no_leak(
    precision: str, noise: Any, outlier: Any, tmp_path: Path
) -> None:
    check_isolation(packing(tmp_path, precision, model=Bent(outlier, noise)).run)


@pytest.mark.parametrize("kernel", [Leaking(), Foreseeing(), Deaf()], ids=["onward", "backward", "not their prompt"])
@pytest.mark.parametrize("share", ["auto", "always"])
def test_answers_that_see_each_other_or_not_their_prompt_do_not_share_it(
    share: str, kernel: Kernel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"answers that share a prompt see each.*\n    cure: set batch.share=never"):
        check_isolation(sharing(tmp_path, share, kernel=kernel))


def test_answers_that_a_kernel_keeps_apart_may_share_their_prompt(tmp_path: Path) -> None:
    check_isolation(sharing(tmp_path, "always"))


def test_nothing_is_probed_where_no_row_holds_what_must_not_see_each_other(tmp_path: Path) -> None:
    check_isolation(sharing(tmp_path / "1", "never", kernel=Leaking()))
    alone = {"train": Rows(sample(text) for text in TEXTS)}
    check_isolation(sharing(tmp_path / "2", splits=alone, kernel=Leaking()))


def test_what_is_made_while_the_run_trains_may_share_a_prompt(tmp_path: Path) -> None:
    alone = {"train": Rows(sample(text) for text in TEXTS)}
    with pytest.raises(UserError, match=r"batch\.share"):
        check_isolation(sharing(tmp_path, splits=alone, objective=Online(), kernel=Leaking()))


def test_packed_pairs_are_told_both_faults_at_once(tmp_path: Path) -> None:
    rows = {"train": Rows(two_answers(text) for text in TEXTS)}
    with pytest.raises(UserError) as caught:
        check_isolation(packing(tmp_path, kernel=Leaking(), splits=rows).run)
    assert [fault.what.partition(":")[0] for fault in caught.value.faults] == ["packing=true", "batch.share"]


def test_what_cannot_be_shown_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(packing(tmp_path, model=Blind()).run)


def test_every_network_is_probed(tmp_path: Path) -> None:
    toy_run = packing(tmp_path, objective=TwoNetworks())
    toy_run.run.roles["value"].engine.network.spec = toy.spec()  # type: ignore[attr-defined]
    check_isolation(toy_run.run)
    spec = toy_run.run.roles["value"].engine.network.spec  # type: ignore[attr-defined]
    object.__setattr__(spec, "kernel", Leaking())
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(toy_run.run)


def test_a_leak_that_another_rank_saw_ends_this_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = packing(tmp_path).run
    monkeypatch.setattr(type(run.world), "total", lambda self, numbers: [number + 1.0 for number in numbers])
    with pytest.raises(UserError, match=REFUSED):
        check_isolation(run)
