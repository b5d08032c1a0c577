"""Losses of pairs of answers. Importing this folder imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from loomtune import hookimpl
from loomtune.contracts import Loss
from loomtune.offers import Offer
from loomtune_plugins.losses import settings

_OFFERED: tuple[tuple[str, str, type, str], ...] = (
    ("sigmoid", "margins:Sigmoid", settings.SmoothedSettings, "DPO: log-odds of preferring the chosen answer"),
    ("sigmoid_norm", "margins:SigmoidNorm", settings.PairLossSettings, "DPO of means over tokens instead of sums"),
    ("hinge", "margins:Hinge", settings.PairLossSettings, "SLiC: no loss beyond a margin"),
    ("ipo", "margins:Ipo", settings.PairLossSettings, "IPO: the preference is to reach 1 / (2 beta), not infinity"),
    ("exo_pair", "margins:ExoPair", settings.DoubtingSettings, "EXO: reverse KL to the smoothed labels"),
    ("robust", "margins:Robust", settings.DoubtingSettings, "unbiased where labels are flipped at a known rate"),
    ("discopop", "margins:Discopop", settings.DiscopopSettings, "logistic and exponential losses, blended"),
    ("nca_pair", "rewards:NcaPair", settings.PairLossSettings, "NCA: raises the chosen answer's own likelihood"),
    ("bco_pair", "rewards:BcoPair", settings.BcoSettings, "BCO: a classifier of good and bad answers"),
    ("sppo_hard", "rewards:SppoHard", settings.PairLossSettings, "SPPO: log-ratios go to fixed values"),
    ("apo_zero", "rewards:ApoZero", settings.PairLossSettings, "APO: chosen up, rejected down"),
    ("apo_down", "rewards:ApoDown", settings.PairLossSettings, "APO: both down, the rejected one more"),
    ("aot", "orders:Aot", settings.SmoothedSettings, "AOT: margins dominate the reference's, rank by rank"),
    ("aot_unpaired", "orders:AotUnpaired", settings.SmoothedSettings, "AOT: all chosen dominate all rejected"),
    ("sft", "likelihoods:Sft", settings.PairLossSettings, "likelihood of the chosen answers, beside another loss"),
    ("kl", "distributions:Kl", settings.KlSettings, "KL to the reference over the vocabulary, against forgetting"),
    ("simpo", "likelihoods:Simpo", settings.SimpoSettings, "SimPO: means over tokens and a margin, no reference"),
    ("odds_ratio", "likelihoods:OddsRatio", settings.PairLossSettings, "ORPO's ratio of odds, no reference"),
)
"""Name, class, settings, summary."""


_ALIASES = {"discopop": {"discopop_tau": "tau"}, "simpo": {"simpo_gamma": "gamma"}}


@hookimpl
def losses() -> Sequence[Offer[Loss]]:
    return tuple(
        Offer(
            name=name,
            build=f"loomtune_plugins.losses.{place}",
            schema=schema,
            summary=summary,
            aliases=_ALIASES.get(name, {}),
        )
        for name, place, schema, summary in _OFFERED
    )
