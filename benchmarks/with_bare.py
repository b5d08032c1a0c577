"""The contender that is a loop written by hand: `python with_bare.py JOB`.

What somebody would write who knows where the time goes: a step's rows sorted by length, only positions that predict a
target reach the head, one division by the step's target tokens, fused AdamW. Linear layers and head are
loomtune's own, so that what it saves over loomtune is what loomtune's loop costs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from clock import CLOCK
from job import Job
from transformers import AutoModelForCausalLM, AutoTokenizer

from loomtune.toolkit.log_probs import target_log_probs
from loomtune_plugins.shardings.linear import quicken

Example = tuple[list[int], int]
"""Token ids, and how many of them are the prompt."""


def main() -> None:
    job = Job.read(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    quicken(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    examples = tokenise(job)
    for step in range(job.steps):
        rows = examples[step * job.batch : (step + 1) * job.batch]
        total = sum(len(ids) - asked for ids, asked in rows)
        loss = sum(accumulate(model, group, total) for group in grouped(rows, job.micro_tokens))
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        CLOCK.mark(len(rows), loss=loss)
    CLOCK.write()


def tokenise(job: Job) -> list[Example]:
    """Prompt and completion as one text, closed by the end token."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    found = []
    for row in job.examples():
        asked = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        found.append((ids[: job.max_length], len(asked)))
    return found


def grouped(rows: list[Example], most: int) -> list[list[Example]]:
    """The longest first, as many together as fit into `most` tokens with padding."""
    groups: list[list[Example]] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0][0]) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def accumulate(model: Any, group: list[Example], total: int) -> float:
    """Adds a micro-batch's gradients; gives its part of the step's mean loss."""
    length = len(group[0][0])
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group])
    here = torch.tensor([i * length + at - 1 for i, (ids, asked) in enumerate(group) for at in range(asked, len(ids))])
    target = torch.tensor([token for ids, asked in group for token in ids[asked:]])
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    loss = -target_log_probs(hidden.flatten(0, 1)[here], model.lm_head, target).sum() / total
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
