"""Noise by keys: the published generator, of the right distribution, and nothing in common between its draws."""

from __future__ import annotations

import math

import torch

from loomtune_plugins.rollouts.noise import RowNoise, gumbel, random_bits

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


def test_rows_places_and_seeds_have_nothing_in_common() -> None:
    def noise(seed: int, number: int, written: int) -> torch.Tensor:
        tokens = torch.zeros(1, 3 + written, dtype=torch.long)
        return RowNoise(seed, [number], 3)(tokens, torch.zeros(1, 20_000))[0]

    drawn = torch.stack([noise(0, 0, 0), noise(0, 0, 1), noise(0, 1, 0), noise(0, 1, 1), noise(1, 0, 0)])
    alike = torch.corrcoef(drawn) - torch.eye(5)
    assert alike.abs().max() < 0.04
    assert torch.equal(noise(0, 0, 1), drawn[1])


def test_the_noise_of_a_row_is_the_same_beside_others_and_behind_padding() -> None:
    scores = torch.zeros(3, 50)
    together = RowNoise(4, [7, 8, 9], 6)(torch.zeros(3, 8, dtype=torch.long), scores)
    alone = RowNoise(4, [8], 2)(torch.zeros(1, 4, dtype=torch.long), scores[:1])
    assert torch.equal(together[1:2], alone)
