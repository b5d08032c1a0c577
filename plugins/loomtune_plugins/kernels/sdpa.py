"""Attention by torch's scaled_dot_product_attention."""

from collections.abc import Mapping
from typing import Any

from loomtune.contracts import Batch, Kernel
from loomtune_plugins.kernels.settings import SDPASettings


class SDPA(Kernel):
    """Plain causal attention where that is exact, an explicit mask where a row holds more than one chain of segments.

    The explicit mask knows no sliding window: the model narrows it for the layers that have one.
    """

    def __init__(self, settings: SDPASettings) -> None:
        self._settings = settings

    def attention(self, batch: Batch, dtype: Any) -> Mapping[str, Any]:
        """`attention_mask`: `(rows, length)` ones for plain causal attention, else `(rows, 1, length, length)` to add,
        by which a CPU attends piece by piece.

        Ones, and not None: without a mask transformers (5.23, `masking_utils.find_packed_sequence_indices`) guesses
        segments from positions that do not rise by 1, takes each padding token for one, and builds a mask. Ones are
        dropped there again (`_ignore_causal_mask_sdpa`), in every architecture, and SDPA runs with `is_causal`.
        """
        from loomtune_plugins.kernels.masks import additive, is_causal
        from loomtune_plugins.kernels.pieces import InPieces

        if is_causal(batch):
            return {"attention_mask": batch.tokens.new_ones(batch.tokens.shape)}
        return {"attention_mask": InPieces.of(additive(batch, dtype), batch)}
