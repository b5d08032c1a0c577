"""Continued pretraining: every token of plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loomtune.contracts import Batch, LossSums, Objective, Row, Sample, Segment, Tokenizer
from loomtune.contracts.objective import Roles, Totals
from loomtune_plugins.objectives.encoding import BOS, Encoded, begin, lacking, refuse, text_of, unknown
from loomtune_plugins.objectives.pretrain_settings import PretrainSettings

VERSION = 1
"""Part of the fingerprint: raise it when the same row gives other tokens."""


class Pretrain(Objective):
    """Cross-entropy of every token of a document but its first, its end among them, as a mean over the whole step.

    A document longer than `max_length` goes on in further samples, none of which is lost or padded. Each begins with
    the last token of the one before, which is its context and not learned again. Others join documents and cut
    wherever a row is full, so that tokens see what has nothing to do with them. Here short documents, and the ends of
    long ones, share rows by `packing=true`, where no token sees another document; without, they are padded.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        refuse(unknown(settings, bos=BOS))

    def sample(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sample:
        """As much of the document as there is room for."""
        return self.samples(row, tokenizer, max_length)[0]

    def samples(self, row: Row, tokenizer: Tokenizer, max_length: int) -> Sequence[Sample]:
        """All of the document. Raises ValueError where it is empty, and where no sample has room to learn anything."""
        if max_length < 2:
            raise ValueError("max_length leaves no room for a token and what comes before it")
        ids = self._document(row, tokenizer)
        return [_learned(ids[start : start + max_length]) for start in range(0, max(1, len(ids) - 1), max_length - 1)]

    def _document(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        if "text" not in row:
            raise lacking(row, "no plain text, which objective=pretrain learns", "set data.text= to a column of text")
        text = text_of(row, "text")
        if not text:
            raise ValueError("has an empty text")
        encoded = Encoded()
        encoded.add(tokenizer.encode(text), learned=True)
        begin(encoded, row, tokenizer, self.settings.bos)
        encoded.end(tokenizer.eos_id)
        return encoded.ids

    def prompt(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """What text begins with, where the model is to write by itself."""
        return self._document(row, tokenizer)[:1]

    def fingerprint(self) -> str:
        """Digest of the settings and of the version of `samples`."""
        return hashlib.sha256(json.dumps(["pretrain", VERSION, self.settings.bos]).encode()).hexdigest()

    def is_likelihood(self) -> bool:
        """Of every token."""
        return True

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The number of target tokens."""
        return {"loss": float(len(batch.target))}

    def loss(self, roles: Roles, batch: Batch, totals: Totals, statistics: Mapping[str, Any]) -> LossSums:
        """The summed negative log-probability of the targets, in nats."""
        from loomtune.toolkit import log_probs

        return LossSums({"loss": -log_probs(roles["policy"], batch).sum()})


def _learned(ids: Sequence[int]) -> Sample:
    return Sample((Segment(np.array(ids, np.int32), np.arange(len(ids)) > 0),))
