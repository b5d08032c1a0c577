"""Memory of the loss block, from hidden states to gradients, by the allocator: `python tests/loss_block.py`.

A loss block turns the hidden states of 4,096 positions into log-probabilities over 32,000 tokens, and their gradients
into those of states and head. The plain path is that of a common training loop: logits of all positions, log_softmax in
fp32, gather. `--write` renews the section in docs/parity.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loomtune.toolkit.log_probs import target_log_probs
from loomtune_plugins.objectives.distill_divergence import compared, divergence

POSITIONS, VOCABULARY, WIDTH = 4096, 32_000, 128
MB = 2**20


class Block:
    """Hidden states `(positions, width)`, a head, and which positions predict a target."""

    def __init__(self, positions: int, vocabulary: int, share: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.hidden, self.other = (torch.randn(positions, WIDTH, generator=draw) for _ in range(2))
        self.hidden.requires_grad_()
        self.head, self.teacher = (nn.Linear(WIDTH, vocabulary, bias=False) for _ in range(2))
        self.teacher.requires_grad_(False)  # its logits have no graph
        self.target = torch.randint(vocabulary, (positions,), generator=draw)
        self.learned = torch.arange(positions) >= positions * (1 - share)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The loss, and what is learned from it."""
        torch.autograd.backward(loss)
        assert self.hidden.grad is not None and self.head.weight.grad is not None
        return [loss.detach(), self.hidden.grad, self.head.weight.grad]


def plain(block: Block) -> list[Tensor]:
    """The log-likelihood, as a common loop has it: what is no target is computed and multiplied by 0."""
    # The logits have no name, so that they are gone before the backward pass, as where a function returns.
    chosen = block.head(block.hidden).float().log_softmax(-1).gather(-1, block.target.unsqueeze(-1)).squeeze(-1)
    return block.gradients(-(chosen * block.learned).sum())


def chunked(block: Block) -> list[Tensor]:
    """The same by the toolkit."""
    at = block.learned.nonzero().squeeze(-1)
    return block.gradients(-target_log_probs(block.hidden[at], block.head, block.target[at]).sum())


def plain_divergence(block: Block) -> list[Tensor]:
    """GKD's divergence of all positions at once."""
    values = divergence(block.head(block.hidden).float(), block.teacher(block.other).float(), 0.5)
    return block.gradients((values * block.learned).sum())


def chunked_divergence(block: Block) -> list[Tensor]:
    """The same as `objective=distill` has it."""
    at = block.learned.nonzero().squeeze(-1)
    values, _ = compared(block.hidden[at], block.head, block.other[at], block.teacher, partial(divergence, beta=0.5))
    return block.gradients(values.sum())


PATHS: Mapping[str, Callable[[Block], list[Tensor]]] = {
    path.__name__: path for path in (plain, chunked, plain_divergence, chunked_divergence)
}


def allocated(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator had given out at once while `work` ran, above what it had before."""
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as seen:
        kept = work()
    del kept
    events = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def fresh(path: str, share: float, *, rss: bool) -> int:
    """Peak bytes of a path in a process of its own: by the allocator, or as resident memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (path, share, rss))


def _measure(path: str, share: float, rss: bool) -> int:
    torch.set_num_threads(1)
    PATHS[path](Block(64, 64))  # what a first call loads is no path's
    block = Block(POSITIONS, VOCABULARY, share)
    if not rss:
        return allocated(lambda: PATHS[path](block))
    before = _resident()
    PATHS[path](block)
    return _resident() - before


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CASES = (
    ("log-probabilities, every position a target", "plain", "chunked", 1.0),
    ("log-probabilities, half of them (a pair's answers)", "plain", "chunked", 0.5),
    ("divergence of a teacher, every position", "plain_divergence", "chunked_divergence", 1.0),
)
HEAD = (
    "of 4,096 positions, 32,000 tokens",
    "plain, MB",
    "ours, MB",
    "ratio",
    "resident, plain",
    "resident, ours",
    "ratio",
)


def rows() -> list[tuple[str, ...]]:
    """The table, measured."""
    found = []
    for name, whole, ours, share in CASES:
        numbers: list[Any] = []
        for rss in (False, True):
            one, other = (fresh(path, share, rss=rss) for path in (whole, ours))
            numbers += [f"{one / MB:.0f}", f"{other / MB:.0f}", f"{other / one:.3f}"]
        found.append((name, *numbers))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the section in docs/parity.md")
    options = parser.parse_args()
    table = [HEAD, ("---",) * len(HEAD), *rows()]
    text = "\n".join("| " + " | ".join(texts) + " |" for texts in table)
    print(text)
    if options.write:
        import parity

        parity.TABLE.write_text(parity.page({"Memory of the loss block": f"\n{TOLD}\n\n{text}\n"}))


TOLD = f"""`python tests/loss_block.py`, fp32, width {WIDTH}: peak bytes above what stood before, by torch's allocator
and as resident memory of a fresh process. From hidden states to the gradients of states and head, which both paths end
with. The plain path makes logits of all positions, log_softmax in fp32 and gather; ours never holds more than a
chunk."""


if __name__ == "__main__":
    main()
