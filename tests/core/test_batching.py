"""Which rows make a step, who computes them, and how they become tensors."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loomtune.batching import collate, evaluation_batches, micro_limit, step_batches
from loomtune.contracts import Placement, Sample, Segment
from loomtune.contracts.batch import NO_PARENT, NO_SEGMENT
from loomtune.placement import MicroLimit, laid_out, place, row_width
from loomtune.settings import BatchSettings, Settings
from loomtune.testing import toy
from loomtune.world import World
from toys import Rows, sample, whole

PAD = 0


def segment(tokens: list[int], targets: list[int], parent: int = NO_PARENT, **columns: list[float]) -> Segment:
    learned = np.isin(np.arange(len(tokens)), targets)
    each = {name: np.array(values, np.float32) for name, values in columns.items()}
    return Segment(np.array(tokens, np.int32), learned, parent, each)


def pair() -> Sample:
    """A prompt of three tokens with two answers, all of whose tokens are learned."""
    return Sample((segment([5, 6, 7], []), segment([8, 9], [0, 1], 0), segment([10], [0], 0)), {"margin": 2.5})


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_each_epoch_visits_every_row_once(rows: int) -> None:
    order = whole(3, rows)
    for epoch in range(3):
        assert sorted(order.rows(epoch * rows, (epoch + 1) * rows).tolist()) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        found: list[int] = whole(seed, 50).rows(number * 50, number * 50 + 50).tolist()
        return found

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert list(range(50)) not in orders
    assert epoch(0, 1) == orders[1]


def test_the_order_of_a_seed_is_the_same_on_every_machine() -> None:
    assert whole(0, 8).rows(0, 8).tolist() == [3, 4, 2, 7, 0, 5, 1, 6]


def lengths_of(count: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randint(1, 90) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 33])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [MicroLimit(1), MicroLimit(3), MicroLimit(100), MicroLimit(100, 128)])
def test_every_row_is_placed_once_in_equally_many_micro_batches(count: int, replicas: int, limit: MicroLimit) -> None:
    numbers, lengths = [100 + i for i in range(count)], lengths_of(count)
    placed = place(numbers, lengths, replicas, limit)
    assert len(placed) == replicas
    assert len({len(mine) for mine in placed}) == 1 and placed[0], "a rank without rows takes part all the same"
    assert sorted(number for mine in placed for one in mine for number in one.numbers) == numbers
    for one in (one for mine in placed for one in mine):
        padded = max((lengths[number - 100] for number in one.numbers), default=0) * len(one.numbers)
        assert len(one.numbers) <= limit.rows
        assert not limit.tokens or padded <= limit.tokens or len(one.numbers) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 33, 200])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [MicroLimit(1, packed=90), MicroLimit(3, packed=200), MicroLimit(99, 256, 128)])
def test_packed_rows_hold_every_sample_once_and_no_more_than_fits(count: int, replicas: int, limit: MicroLimit) -> None:
    numbers, lengths = [100 + i for i in range(count)], lengths_of(count)
    placed = place(numbers, lengths, replicas, limit)
    assert len({len(mine) for mine in placed}) == 1 and placed[0], "a rank without rows takes part all the same"
    assert sorted(number for mine in placed for one in mine for number in one.numbers) == numbers
    for one in (one for mine in placed for one in mine):
        filled = [sum(lengths[number - 100] for number in row) for row in one.rows]
        assert all(filled) and max(filled, default=0) <= limit.packed
        assert len(filled) <= limit.rows
        assert not limit.tokens or max(filled, default=0) * len(filled) <= limit.tokens


def rows_of(placed: list[list[Placement]]) -> list[list[int]]:
    """How many rows each micro-batch of each replica has."""
    return [[len(one.rows) for one in mine] for mine in placed]


def test_packing_takes_as_few_rows_as_fit_but_not_fewer_than_there_are_replicas() -> None:
    lengths = [60, 50, 40, 30, 20]
    assert rows_of(place(range(5), lengths, 1, MicroLimit(8, packed=100))) == [[2]]
    assert rows_of(place(range(5), lengths, 1, MicroLimit(8, packed=200))) == [[1]]
    assert rows_of(place(range(5), lengths, 2, MicroLimit(8, packed=200))) == [[1], [1]]
    assert rows_of(place(range(5), lengths, 4, MicroLimit(8, packed=200))) == [[1]] * 4


def test_packed_rows_are_of_like_length() -> None:
    ((one,), (other,)) = place(range(6), [40, 30, 30, 20, 20, 10], 2, MicroLimit(8, packed=150))
    assert {sum([40, 30, 30, 20, 20, 10][number] for number in row) for row in (*one.rows, *other.rows)} <= {70, 80}


def test_few_rows_are_kept_where_spreading_would_need_more() -> None:
    ((one, other),) = place(range(5), [60, 50, 40, 30, 20], 1, MicroLimit(1, packed=100))
    assert [sorted(row) for row in (*one.rows, *other.rows)] == [[0, 2], [1, 3, 4]], "evenly, 20 would find no room"


def test_no_replica_waits_long_for_another_where_micro_batches_hold_many_rows() -> None:
    """Six full micro-batches on four replicas would keep two of them waiting half of the time."""
    placed = place(range(191), [512] * 191, 4, MicroLimit(256, 32 * 512, 512))
    assert sorted(rows_of(placed)) == [[24, 23], *[[24, 24]] * 3]


def test_a_sample_longer_than_a_packed_row_has_one_of_its_own() -> None:
    ((one,),) = place(range(3), [500, 40, 30], 1, MicroLimit(8, packed=100))
    assert sorted(one.rows) == [(0,), (1, 2)]


def test_placing_is_pure() -> None:
    lengths = lengths_of(20)
    before = list(lengths)
    assert place(range(20), lengths, 3, MicroLimit(4)) == place(range(20), lengths, 3, MicroLimit(4))
    assert lengths == before


def test_rows_of_like_length_are_computed_together() -> None:
    (mine,) = place(range(6), [1, 50, 2, 49, 3, 48], 1, MicroLimit(2))
    assert [one.numbers for one in mine] == [(1, 3), (5, 4), (2, 0)]


def test_a_row_longer_than_the_budget_is_computed_alone() -> None:
    (mine,) = place(range(3), [200, 5, 5], 1, MicroLimit(8, 64))
    assert [one.numbers for one in mine] == [(0,), (1, 2)]


def test_replicas_share_a_step_evenly_even_where_one_could_take_all_of_it() -> None:
    placed = place(range(8), [10] * 8, 4, MicroLimit(100))
    assert [[len(one.numbers) for one in mine] for mine in placed] == [[2]] * 4


def test_the_longest_rows_do_not_all_meet_one_rank() -> None:
    placed = place(range(4), [4, 3, 2, 1], 2, MicroLimit(1))
    assert [[one.numbers for one in mine] for mine in placed] == [[(0,), (3,)], [(1,), (2,)]]


def test_a_target_is_predicted_from_the_token_before_it() -> None:
    batch = collate([Sample((segment([5, 6, 7, 8], [2, 3]),)), Sample((segment([9, 4], [1]),))], [3, 8], PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 4, PAD, PAD]]
    assert batch.target.tolist() == [7, 8, 4]
    flat = batch.tokens.flatten()
    assert flat[batch.predict_from].tolist() == [6, 7, 9]
    assert flat[batch.predict_from + 1].tolist() == batch.target.tolist()
    assert batch.row.tolist() == [0, 0, 1]
    assert batch.sample_numbers.tolist() == [3, 8]


def test_padding_belongs_to_no_segment() -> None:
    batch = collate([Sample((segment([5, 6, 7], [2]),)), Sample((segment([9], []),))], [0, 1], PAD)
    assert batch.segments.tolist() == [[0, 0, 0], [1, NO_SEGMENT, NO_SEGMENT]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_answers_go_on_from_the_end_of_their_prompt() -> None:
    batch = collate([Sample((segment([4], []),)), pair()], [0, 1], PAD)
    row = batch.tokens[1].tolist()
    assert row == [5, 6, 7, 8, 9, 10]
    assert batch.positions[1].tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.parents.tolist() == [NO_PARENT, NO_PARENT, 1, 1]
    assert batch.sample_of_segment.tolist() == [0, 1, 1, 1]
    assert batch.target.tolist() == [8, 9, 10]
    assert batch.tokens.flatten()[batch.predict_from].tolist() == [7, 8, 7], "both begin after the prompt's last token"
    assert batch.row.tolist() == [2, 2, 3]


def test_a_segment_without_tokens_hands_on_where_its_child_begins() -> None:
    turns = Sample((segment([5, 6], []), segment([], [], 0), segment([7, 8], [0, 1], 1)))
    batch = collate([turns], [0], PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]]
    assert batch.segments.tolist() == [[0, 0, 2, 2]]
    assert batch.tokens.flatten()[batch.predict_from].tolist() == [6, 7]


def test_numbers_and_columns_follow_their_samples_and_targets() -> None:
    scored = Sample((segment([1, 2, 3], [1, 2], advantage=[0.5, -1.0]),), {"margin": 1.0})
    other = Sample((segment([1, 2], [1], advantage=[4.0]),), {"margin": 3.0})
    columns = collate([scored, other], [0, 1], PAD).columns
    assert columns["margin"].tolist() == [1.0, 3.0]
    assert columns["advantage"].tolist() == [0.5, -1.0, 4.0]
    assert all(column.dtype == torch.float32 for column in columns.values())


def test_packed_samples_stand_one_after_the_other_and_each_counts_its_own_positions() -> None:
    other, last = Sample((segment([4, 3], [1]),), {"margin": 1.0}), Sample((segment([9, 2], [1]),), {"margin": 0.0})
    batch = collate([pair(), other, last], [7, 8, 9], PAD, rows=[2, 1])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 4, 3], [9, 2, *[PAD] * 6]]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [4, 4, *[NO_SEGMENT] * 6]]
    assert batch.parents.tolist() == [NO_PARENT, 0, 0, NO_PARENT, NO_PARENT]
    assert batch.sample_of_segment.tolist() == [0, 0, 0, 1, 2]
    assert batch.target.tolist() == [8, 9, 10, 3, 2]
    assert batch.tokens.flatten()[batch.predict_from].tolist() == [7, 8, 7, 4, 9]
    assert batch.sample_numbers.tolist() == [7, 8, 9]


def test_a_micro_batch_without_rows_has_one_padding_token_and_every_column() -> None:
    like = Sample((segment([1, 2], [1], advantage=[4.0]),), {"margin": 3.0})
    batch = collate([], [], PAD, like)
    assert batch.tokens.tolist() == [[PAD]]
    assert batch.segments.tolist() == [[NO_SEGMENT]]
    assert {name: column.tolist() for name, column in batch.columns.items()} == {"margin": [], "advantage": []}
    empty = (batch.target, batch.predict_from, batch.row, batch.parents, batch.sample_numbers)
    assert all(len(tensor) == 0 and tensor.dtype == torch.int64 for tensor in empty)


def test_a_column_may_hold_several_numbers_of_each_target() -> None:
    two, none = segment([1, 2, 3], [1, 2]), segment([4], [])
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    wide = Sample((none, two, segment([5], [0], 1))).with_column("logits", values)
    assert [one.columns["logits"].tolist() for one in wide.segments] == [[], [[0, 1], [2, 3]], [[4, 5]]]
    again = Sample.parse(json.loads(json.dumps(wide.plain())))
    for one in (wide, again, wide.unfolded()):
        assert collate([one, wide], [0, 1], PAD).columns["logits"].tolist() == [*values.tolist(), *values.tolist()]
        assert collate([], [], PAD, one).columns["logits"].shape == (0, 2)


def test_a_column_that_some_targets_lack_is_no_column() -> None:
    with pytest.raises((AssertionError, KeyError)):
        collate([Sample((segment([1, 2], [1], old=[1.0]), segment([3], [0], 0)))], [0], PAD)


def test_a_sample_is_kept_to_the_bit() -> None:
    third = np.float32(1) / np.float32(3)
    given = Sample((segment([5, 6], []), segment([8, 9], [0, 1], 0, advantage=[third, -0.1])), {"margin": 0.1})
    again = Sample.parse(json.loads(json.dumps(given.plain())))
    assert again.numbers == given.numbers
    for one, other in zip(again.segments, given.segments, strict=True):
        assert one.parent == other.parent and one.columns.keys() == other.columns.keys()
        assert (one.tokens.dtype, one.is_target.dtype) == (np.int32, np.bool_)
        assert one.tokens.tobytes() == other.tokens.tobytes() and one.is_target.tolist() == other.is_target.tolist()
        assert all(one.columns[name].tobytes() == other.columns[name].tobytes() for name in other.columns)


def test_numbers_of_any_width_are_kept_as_the_contract_has_them() -> None:
    wide = Segment(np.array([5, 6]), np.array([0, 1]), columns={"advantage": np.array([0.25])})  # type: ignore[arg-type]
    (again,) = Sample.parse(json.loads(json.dumps(Sample((wide,)).plain()))).segments
    assert (again.tokens.tolist(), again.is_target.tolist()) == ([5, 6], [False, True])
    assert again.columns["advantage"].tolist() == [0.25]


def run_on(replica: int, replicas: int, micro: int | str = 1, **settings_: Any) -> Any:
    world = World(replica, replicas, 0, torch.device("cpu"), replica=replica, replicas=replicas)
    settings = Settings(batch=BatchSettings(size=8, micro=micro), **settings_)
    splits = {"train": Rows(sample("x" * (1 + index)) for index in range(5))}
    width = row_width(settings, model := toy.ToyModel(), 0)
    parts = {"tokenizer": toy.ToyTokenizer(), "model": model, "splits": splits, "max_length": width}
    return SimpleNamespace(world=world, settings=settings, token_budget=200, **parts)


def test_replicas_together_compute_the_step_under_the_numbers_of_its_visits() -> None:
    samples = [sample("ab"), sample("abc"), sample("a")]
    ranks = [step_batches(run_on(replica, 2), samples, range(40, 43), MicroLimit(1)) for replica in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    numbers = [number for batches in ranks for batch in batches for number in batch.sample_numbers.tolist()]
    assert sorted(numbers) == [40, 41, 42]
    lengths = {int(b.sample_numbers): b.tokens.shape[1] for batches in ranks for b in batches if len(b.sample_numbers)}
    assert lengths == {40: 3, 41: 4, 42: 2}, "the number goes with its sample"


def test_a_split_is_measured_once_over_all_replicas() -> None:
    ranks = [evaluation_batches(run_on(replica, 3), "train") for replica in range(3)]
    assert sorted(number for one in ranks for batch in one for number in batch.sample_numbers.tolist()) == [*range(5)]
    some = [evaluation_batches(run_on(replica, 3), "train", 2) for replica in range(3)]
    assert sorted(number for one in some for batch in one for number in batch.sample_numbers.tolist()) == [0, 1]


def test_a_micro_batch_is_what_the_settings_ask_for_or_fits_the_budget() -> None:
    assert micro_limit(run_on(0, 1, 3)) == MicroLimit(3)
    assert micro_limit(run_on(0, 1, "auto")) == MicroLimit(8, 200)


def test_a_packed_row_is_as_long_as_a_sample_may_be_and_auto_keeps_it_within_the_budget() -> None:
    assert micro_limit(run_on(0, 1, 3, packing=True)) == MicroLimit(3, packed=toy.CONTEXT)
    assert micro_limit(run_on(0, 1, 3, packing=True, max_length=90)) == MicroLimit(3, packed=90)
    assert micro_limit(run_on(0, 1, "auto", packing=True, max_length=90)) == MicroLimit(8, 200, 90)
    assert micro_limit(run_on(0, 1, "auto", packing=True)) == MicroLimit(8, 200, 200)


def test_a_run_that_packs_lays_a_step_s_samples_into_one_row_under_their_own_numbers() -> None:
    samples = [sample("ab"), sample("abc"), sample("a")]
    (batch,) = step_batches(run_on(0, 1, packing=True), samples, range(40, 43), MicroLimit(8, packed=64))
    assert batch.tokens.shape == (1, sum(one.length for one in samples))
    by_number = {int(number): samples[int(number) - 40].targets for number in batch.sample_numbers}
    owners = batch.sample_numbers[batch.sample_of_segment[batch.row]].tolist()
    assert {number: owners.count(number) for number in by_number} == by_number


def tree() -> Sample:
    """A prompt with two answers, of which the second goes on; the prompt's last token is learned too."""
    return Sample(
        (
            segment([1, 2, 3], [2]),
            segment([4, 5], [0, 1], 0),
            segment([6], [0], 0),
            segment([7, 8], [0, 1], 2),
        )
    )


def test_an_unfolded_sample_learns_each_target_once_from_the_same_tokens() -> None:
    shared, unfolded = tree(), tree().unfolded()
    assert [s.tokens.tolist() for s in unfolded.segments] == [[1, 2, 3], [4, 5], [1, 2, 3], [6], [7, 8]]
    assert [s.parent for s in unfolded.segments] == [-1, 0, -1, 2, 3]
    assert unfolded.parts == (0, 1, 0, 2, 3) and unfolded.trees == [5, 6]
    assert unfolded.targets == shared.targets
    assert unfolded.unfolded().length == unfolded.length
    assert pair().unfolded().parts == (0, 1, 0, 2)
    single = Sample((segment([1, 2], [1]),))
    assert single.unfolded() is single


def test_trees_of_a_lone_sample_have_rows_of_their_own_and_packed_ones_follow_each_other() -> None:
    alone = collate([tree().unfolded(), tree()], [0, 1], PAD)
    assert alone.tokens.tolist() == [
        [1, 2, 3, 4, 5, PAD, PAD, PAD],
        [1, 2, 3, 6, 7, 8, PAD, PAD],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert alone.part.tolist() == [0, 1, 0, 2, 3, 0, 1, 2, 3]
    packed = collate([tree().unfolded(), tree()], [0, 1], PAD, rows=[2])
    assert packed.tokens.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]]
    for batch in (alone, packed):
        flat = batch.tokens.flatten()
        assert flat[batch.predict_from].tolist() == [2, 3, 4, 3, 6, 7] * 2
        assert batch.target.tolist()[:6] == [3, 4, 5, 6, 7, 8]


def test_sharing_is_chosen_where_it_saves_enough_tokens() -> None:
    short = Sample((segment([1], []), segment([2] * 9, [0], 0), segment([3] * 9, [0], 0)))
    assert laid_out([tree()], MicroLimit(1, share=True))[0].parts == ()
    assert laid_out([tree()], MicroLimit(1, share=False))[0].parts != ()
    assert laid_out([short], MicroLimit(1))[0].parts != ()
    long = Sample((segment([1] * 9, []), segment([2], [0], 0), segment([3], [0], 0)))
    assert laid_out([long], MicroLimit(1))[0].parts == ()
