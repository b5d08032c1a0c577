"""Whether answers share their prompt's computation: decided by predicted work, for a step as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from loomtune.contracts import Sample, Segment
from loomtune.placement import PAIRS, PRICE, SEGMENT, MicroLimit, laid_out

ANY = MicroLimit(1)


def pair(prompt: int, *answers: int) -> Sample:
    """A prompt and answers to it, of so many tokens."""

    def segment(length: int, parent: int) -> Segment:
        return Segment(np.ones(length, np.int32), np.full(length, parent == 0), parent)

    return Sample((segment(prompt, -1), *(segment(length, 0) for length in answers)))


def shares(samples: Sequence[Sample], limit: MicroLimit = ANY) -> bool:
    laid = laid_out(samples, limit)
    assert all((one.parts == ()) is (laid[0].parts == ()) for one in laid), "a step has one layout"
    return laid[0].parts == ()


@pytest.mark.parametrize("lengths", [(100, 100, 100), (256, 128, 128), (384, 64, 64), (60, 200, 200), (30, 20, 20)])
def test_prompts_are_shared_where_the_tokens_that_it_saves_outweigh_its_mask(lengths: tuple[int, ...]) -> None:
    assert shares([pair(*lengths)])


@pytest.mark.parametrize("lengths", [(20, 200, 200), (8, 8, 8), (1, 9, 9), (40, 480, 480)])
def test_prompts_that_are_short_beside_their_answers_are_computed_for_each(lengths: tuple[int, ...]) -> None:
    assert not shares([pair(*lengths)])


def test_answers_of_unequal_length_share_even_a_short_prompt_rather_than_be_padded_to_each_other() -> None:
    assert shares([pair(20, 100, 400)]) and not shares([pair(20, 250, 250)])


def test_the_predicted_work_of_a_step_decides_for_all_its_samples() -> None:
    short, long = pair(20, 200, 200), pair(256, 128, 128)
    assert shares([short, long]) and not shares([short] * 20 + [long])


def test_it_breaks_even_where_saved_tokens_cost_what_the_mask_does() -> None:
    prompt, answer = 100, 400
    apart = 2 * (prompt + answer) ** 2 / PAIRS
    once = PRICE * (prompt**2 + 2 * answer * (prompt + answer)) / PAIRS + 3 * SEGMENT
    assert (once < apart + prompt) is shares([pair(prompt, answer, answer)])


def test_packed_rows_have_a_mask_either_way_so_that_sharing_costs_nothing() -> None:
    samples = [pair(20, 200, 200)]
    assert shares(samples, MicroLimit(1, packed=1024)) and not shares(samples)


def test_what_is_asked_for_is_done_whatever_is_predicted() -> None:
    for lengths in ((20, 200, 200), (256, 128, 128)):
        assert shares([pair(*lengths)], MicroLimit(1, share=True))
        assert not shares([pair(*lengths)], MicroLimit(1, share=False))


def test_a_sample_of_one_answer_stays_as_it_is() -> None:
    for sample in (pair(100), pair(100, 50)):
        for limit in (ANY, MicroLimit(1, share=False), MicroLimit(1, packed=512)):
            assert laid_out([sample], limit)[0] == sample
