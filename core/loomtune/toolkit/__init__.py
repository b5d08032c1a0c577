"""Public, versioned tensor functions that any plugin may import. Version 1: names and meanings stay."""

from loomtune.toolkit.dropout import SeededDropout, dropout_keys, replace_dropout
from loomtune.toolkit.log_probs import log_probs, row_sums
from loomtune.toolkit.sums import masked_mean, masked_sum

__all__ = ["SeededDropout", "dropout_keys", "log_probs", "masked_mean", "masked_sum", "replace_dropout", "row_sums"]
