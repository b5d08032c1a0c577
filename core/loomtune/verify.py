"""Whether what leaves says what was trained: logits of both, on rows of the run that were held out where there are any.

Three comparisons at most, each with a bound of its own, relative to the largest logit. What was trained is the adapter
on its base, computed in fp32 on the CPU. One network is in memory at a time, and of each only its logits are kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from loomtune.batching import collate
from loomtune.catalogue import Catalogue
from loomtune.contracts import Adapter, EngineSpec, Model, Sample, Segment, Tokenizer, Trained, WeightSource
from loomtune.contracts.batch import NO_PARENT
from loomtune.contracts.saved import HEADS
from loomtune.errors import ExportError, UserError
from loomtune.offers import Trait
from loomtune.plan import Plan
from loomtune.samples import of_run
from loomtune.toolkit.network import PREFIX, Network
from loomtune.world import derive

if TYPE_CHECKING:
    from loomtune.contracts.exporter import Opener

ROWS, TOKENS = 8, 64
"""How many rows are compared, and how many tokens of each at most."""

EXACT = 1e-4
"""Bound of a merge, which is computed in fp32: sums in another order, through all layers."""

ROUNDED: Mapping[torch.dtype, float] = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Bounds of what is kept in shorter numbers; `docs/checkpoints.md` says how they were measured."""

APPROXIMATE = 1.0
"""Bound of the distance to a base in 4 bits, on which the adapter was trained: beyond, nothing is in common."""

CURE = "\n    cure: tell the author of the adapter or the exporter; --no-check exports unproven"

MESSAGES = ({"role": "user", "content": "Is this what was trained?"},)


class Text(NamedTuple):
    """A row: where it came from, and its first tokens."""

    origin: str
    tokens: list[int]


@torch.no_grad()
def compared(
    plan: Plan, catalogue: Catalogue, trained: Trained, opened: Mapping[str, Any] | Opener, folder: Path
) -> dict[str, Any] | None:
    """What was measured, as `export.json` has it; None where nothing opens what was exported.

    opened: see `Exporter.reopened`. folder: the run's. Raises ExportError where a difference is beyond its bound, or a
    text becomes other tokens.
    """
    bench, found, bound = _Bench(plan, catalogue, trained, folder), dict[str, Any](), EXACT
    wanted = bench.trained(trained.adapter)
    if isinstance(opened, Mapping):
        model: Model = catalogue.build("model", opened["name"], opened)
        _check_text(trained.model.tokenizer(), model.tokenizer(), bench.texts)
        source = model.weights(plan.root.seed)
        kinds = {source.dtype(name) for name in source.shapes()}
        bound = max([EXACT, *(ROUNDED[kind] for kind in kinds & ROUNDED.keys())])
        if bound > EXACT:  # a fault of the merge could hide behind the rounding
            said = bench.says(bench.plain(bench.model, trained.merged()))
            found["merged"] = bench.apart("the merge, before rounding, differs from what was trained", said, wanted)
        said = bench.says(bench.plain(model, _all(source)))
    elif ask := opened(bench.plain(bench.model, _all(trained.weights)).base):
        said = [ask(torch.tensor([text.tokens]))[0, :-1] for text in bench.texts]
        del ask  # and the model with it
    else:
        return None
    found["exported"] = bench.apart("what was exported differs from what was trained", said, wanted, bound)
    if (approximate := plan.build(catalogue, "adapter")).exact() is not approximate:
        said = bench.trained(approximate)
        words = "what was trained, on an approximation of the base, differs from the same on the base as it is stored"
        found["approximate"] = bench.apart(words, wanted, said, APPROXIMATE)
    return {"compared": found, "tokens": bench.tokens, "rows": [text.origin for text in bench.texts]}


def _all(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    return ((name, source.read(name)) for name in source.shapes())


class _Bench:
    """Has networks say something about the same texts."""

    def __init__(self, plan: Plan, catalogue: Catalogue, trained: Trained, folder: Path) -> None:
        self.model, self._left = trained.model.exact(), trained
        whole = next(e.offer for e in catalogue.entries("adapter") if Trait.WHOLE_MODEL in e.offer.provides)
        nothing = catalogue.build("adapter", whole.name, {})
        kernel = next(iter(plan.build(catalogue, "kernel").values()))
        self._spec = EngineSpec(
            model=self.model, adapter=nothing, kernel=kernel, optimizer=None, precision="fp32", seed=plan.root.seed
        )
        self.texts = _texts(folder, min(TOKENS, self.model.context() - trained.adapter.virtual_tokens), self.model)
        self.tokens = sum(len(text.tokens) for text in self.texts)

    def trained(self, adapter: Adapter) -> list[Tensor]:
        """The logits of what was trained, by an adapter of the same names."""
        network, left = Network(replace(self._spec, adapter=adapter)), self._left
        names, first = network.source.shapes(), network.source.read
        tensors = ((name, left.fetch(name) if name in left.kept else first(name)) for name in names)
        return self.says(_filled(network, tensors))

    def plain(self, model: Model, tensors: Iterable[tuple[str, Tensor]]) -> Network:
        """A model without an adapter."""
        return _filled(Network(replace(self._spec, model=model)), tensors)

    def says(self, network: Network) -> list[Tensor]:
        """`(tokens but the last, vocabulary)` logits for each text, of which every token but the first is predicted."""
        pad, said = self.model.tokenizer().pad_id, list[Tensor]()
        for _, tokens in self.texts:
            sample = Sample((Segment(np.array(tokens, np.int32), np.arange(len(tokens)) > 0),))
            said.append(network(collate([sample], [0], pad), lambda view: view.heads["lm"](view.states), True))
        return said

    def apart(self, what: str, found: list[Tensor], wanted: list[Tensor], bound: float = EXACT) -> dict[str, float]:
        """The largest difference and that of the root mean squares. Raises ExportError where the first is too large."""
        scale = max(float(logits.abs().max()) for logits in wanted)
        apart = [torch.nan_to_num((one - other).abs(), nan=math.inf) for one, other in zip(found, wanted, strict=True)]
        worst = max(range(len(apart)), key=lambda row: float(apart[row].max()))
        largest = float(apart[worst].max()) / scale
        line = f"{what} by {largest:.1e} of the largest logit"
        if not largest <= bound:
            where = f"row {self.texts[worst].origin}, after token {int(apart[worst].amax(-1).argmax())}"
            rounds = "; the exporter's dtype may keep fp32 where rounding is at fault" if bound > EXACT else ""
            raise ExportError(f"{line} ({where}); the bound is {bound:.0e}{CURE}{rounds}")
        print(f"loomtune: {line} (bound {bound:.0e}; {self.tokens} tokens)", file=sys.stderr)  # noqa: T201
        squares = [torch.cat([part.flatten() for part in parts]).square().mean() for parts in (apart, wanted)]
        return {"largest": largest, "rms": float((squares[0] / squares[1]).sqrt()), "bound": bound}


def _filled(network: Network, tensors: Iterable[tuple[str, Tensor]]) -> Network:
    """The network in fp32 on the CPU. Raises ExportError where a tensor is not among what it has, or one lacks."""
    for tensor in (*network.parameters(), *network.buffers()):
        kind = torch.float32 if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=kind, device="cpu")
        # The same objects get storage: tied ones would be parted otherwise.
        torch.utils.swap_tensors(tensor, nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty)  # type: ignore[no-untyped-call]
    places = {name.removeprefix(PREFIX): tensor for name, tensor in network.state_dict(keep_vars=True).items()}
    waiting = {id(tensor): name for name, tensor in places.items()}
    for name, tensor in tensors:
        if name.startswith(HEADS):
            continue
        if name not in places or places[name].shape != tensor.shape:
            raise ExportError(f"{name} {tuple(tensor.shape)} is no tensor of the model{CURE}")
        places[name].copy_(tensor)
        waiting.pop(id(places[name]), None)
    if waiting:
        raise ExportError(f"the merged model lacks {', '.join(sorted(waiting.values())[:5])}{CURE}")
    network.spec.model.restore_buffers(network.base)
    return network.eval()


def _texts(folder: Path, longest: int, model: Model) -> list[Text]:
    """Rows of the run's splits, the training rows last; tokens drawn from nothing where its samples are gone."""
    found = list[Text]()
    try:
        splits = of_run(folder)
    except (OSError, ValueError, KeyError, UserError):
        splits = {}
    for _, samples in sorted(splits.items(), key=lambda split: split[0] == "train"):
        for index in range(min(len(samples), ROWS - len(found))):
            tokens = _chain(samples[index])[:longest]
            found += [Text(samples.origin(index), tokens)] if len(tokens) > 1 else []
    if found:
        return found
    generator = torch.Generator().manual_seed(derive(0, "verify"))
    return [Text("drawn", torch.randint(model.vocabulary(), (longest,), generator=generator).tolist())]


def _chain(sample: Sample) -> list[int]:
    """Tokens of a sample's first segment and of the first that follow each other from it."""
    tokens, last = list[int](), NO_PARENT
    for number, segment in enumerate(sample.segments):
        if segment.parent == last:
            tokens, last = [*tokens, *segment.tokens.tolist()], number
    return tokens


def _check_text(ours: Tokenizer, theirs: Tokenizer, texts: list[Text]) -> None:
    """Raises ExportError where two tokenizers do not agree about the texts, a conversation or special tokens."""
    said = [ours.decode(text.tokens, special=True) for text in texts]
    for what, one, other in (
        ("special tokens", *((by.bos_id, by.eos_id, by.pad_id) for by in (ours, theirs))),
        ("token ids", *([by.encode(text) for text in said] for by in (ours, theirs))),
        ("conversations", _rendered(ours), _rendered(theirs)),
        ("chat templates", ours.template, theirs.template),
    ):
        if one != other:
            raise ExportError(f"the exported tokenizer gives other {what}: {other!s:.300}, not {one!s:.300}{CURE}")


def _rendered(tokenizer: Tokenizer) -> str | None:
    """A conversation as the chat template writes it; None where there is none or it objects."""
    try:
        return tokenizer.render(MESSAGES, reply=True)
    except UserError:
        return None
