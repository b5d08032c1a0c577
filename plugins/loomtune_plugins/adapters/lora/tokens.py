"""Rows of the embedding that are trained by themselves, and the tokens that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Model, Tokenizer, WeightSource
from loomtune.errors import Fault, UserError, near

if TYPE_CHECKING:
    from torch import Tensor


def ids(tokens: Sequence[int | str], model: Model) -> list[int]:
    """Ids of tokens, each once, in their order. Raises UserError naming every one that the model has not."""
    if not tokens:
        return []
    size, faults, found = model.vocabulary(), list[Fault](), set[int]()
    tokenizer = model.tokenizer() if any(isinstance(token, str) for token in tokens) else None
    for token in tokens:
        number = _id(token, tokenizer) if isinstance(token, str) and tokenizer else token
        if isinstance(number, int) and 0 <= number < size:
            found.add(number)
        elif isinstance(token, str) and tokenizer:
            known = (tokenizer.decode([number], special=True) for number in range(size))
            what = f"adapter.tokens names '{token}', which is no token of the model.{near(token, known)}"
            faults.append(Fault(what, "name tokens as the tokenizer writes them, or their ids"))
        else:
            faults.append(Fault(f"adapter.tokens names {token}, and the model has {size} rows", "name a smaller id"))
    if faults:
        raise UserError(*faults)
    return sorted(found)


def _id(token: str, tokenizer: Tokenizer) -> int | None:
    """The one token that the text is, with a space before it where the tokenizer puts one there."""
    found = tokenizer.encode(token)
    return found[0] if len(found) == 1 else None


def check_rows(module: Any, tokens: Sequence[int], adapted: Iterable[str]) -> None:
    """Raises UserError where the rows are trained otherwise too, or the model says not where they are."""
    find = getattr(module, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    if embedding is None:
        raise UserError.of("adapter.tokens needs an embedding, and the model names none", "leave adapter.tokens out")
    name = next(name for name, part in module.named_modules() if part is embedding)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    tied = head is not None and head.weight is embedding.weight
    ends = {name} | ({other for other, part in module.named_modules() if part is head} if tied else set())
    if both := sorted(ends & set(adapted)):
        what = f"adapter.tokens trains rows of '{both[0]}', which is trained whole or adapted besides"
        raise UserError.of(what, "leave it out of adapter.modules and adapter.targets, or leave adapter.tokens out")
    if max(tokens) >= (size := len(embedding.weight)):
        raise UserError.of(f"adapter.tokens names {max(tokens)}, and the model has {size} rows", "name a smaller id")


def rows(base: WeightSource, name: str, tokens: Sequence[int]) -> Tensor:
    """`(tokens, width)` in fp32, read row by row: the whole table may be large."""
    import torch

    return torch.cat([base.read(name, (slice(token, token + 1),)).float() for token in tokens])
