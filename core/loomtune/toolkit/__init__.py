"""Public, versioned tensor functions that any plugin may import. Version 1: names and meanings stay."""

from loomtune.toolkit.advantages import gae, kl_estimates, whiten
from loomtune.toolkit.dropout import SeededDropout, dropout_keys, replace_dropout
from loomtune.toolkit.log_probs import entropy, kl, log_probs, log_sum_squares, observed, row_sums
from loomtune.toolkit.sums import masked_mean, masked_sum

__all__ = [
    "SeededDropout",
    "dropout_keys",
    "entropy",
    "gae",
    "kl",
    "kl_estimates",
    "log_probs",
    "log_sum_squares",
    "masked_mean",
    "masked_sum",
    "observed",
    "replace_dropout",
    "row_sums",
    "whiten",
]
