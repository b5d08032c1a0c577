"""Noise by keys: the published generator, of the right distribution, and nothing in common between its draws."""

from __future__ import annotations

import math

import torch

from loomtune.contracts import Sampling
from loomtune_plugins.rollouts.noise import Choice, gumbel, random_bits

WRAP = 2**64


def split_mix(state: int) -> int:
    """One output of SplitMix64 in Python's unbounded integers; the state is advanced before."""
    z = (state + 0x9E3779B97F4A7C15) % WRAP
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WRAP
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WRAP
    return z ^ z >> 31


def test_bits_are_those_of_the_published_generator() -> None:
    keys = [0, 1, 2**62 + 12345, -5]
    found = random_bits(torch.tensor(keys), 50)
    expected = [[split_mix(key + i * 0x9E3779B97F4A7C15) for i in range(50)] for key in keys]
    assert [[value % WRAP for value in row] for row in found.tolist()] == expected
    assert expected[0][0] == 0xE220A8397B1DCDAF, "the generator's first output from the state 0"


def test_draws_have_the_moments_and_the_tail_of_a_gumbel_distribution() -> None:
    drawn = gumbel(torch.arange(200), 5000).double()
    assert drawn.isfinite().all()
    assert abs(drawn.mean() - 0.57722) < 0.005 and abs(drawn.var() - math.pi**2 / 6) < 0.01
    for height in (-1.0, 0.0, 2.0, 6.0, 9.0):
        expected = -math.expm1(-math.exp(-height))
        assert abs((drawn > height).double().mean() / expected - 1) < 5 / math.sqrt(1e6 * expected), height


def noise(count: int, *places: tuple[int, int]) -> torch.Tensor:
    return Choice(Sampling(max_tokens=1, temperature=1.0))(torch.zeros(len(places), count), places)[0]


def test_keys_and_places_have_nothing_in_common() -> None:
    drawn = noise(20_000, (0, 0), (0, 1), (1, 0), (1, 1), (2**62, 0))
    alike = torch.corrcoef(drawn) - torch.eye(5)
    assert alike.abs().max() < 0.04
    assert torch.equal(noise(20_000, (0, 1)), drawn[1:2])


def test_the_noise_of_a_row_is_the_same_beside_others() -> None:
    together = noise(50, (7, 2), (8, 2), (9, 5))
    assert torch.equal(together[1:2], noise(50, (8, 2)))


def test_what_is_chosen_is_told_with_its_log_probability_before_any_cut() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 3
    places = [(key, 0) for key in range(40)]
    for sampling in (
        Sampling(max_tokens=1),
        Sampling(max_tokens=1, temperature=0.7),
        Sampling(max_tokens=1, temperature=1.7, top_k=3, top_p=0.8),
    ):
        scores, tokens, found = Choice(sampling)(logits, places)
        expected = (logits / (sampling.temperature or 1.0)).log_softmax(-1).gather(1, tokens.unsqueeze(1))[:, 0]
        assert torch.equal(scores.argmax(-1), tokens)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert (tokens == logits.argmax(-1)).all() == (sampling.temperature == 0)
