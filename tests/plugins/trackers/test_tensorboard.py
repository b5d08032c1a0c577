"""TensorBoard's files hold what was measured."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loomtune_plugins.trackers.settings import TensorBoardSettings
from loomtune_plugins.trackers.tensorboard import TensorBoard


def scalars(folder, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def tensorboard() -> TensorBoard:
    return TensorBoard(TensorBoardSettings())


def test_steps_and_evaluations_are_scalars_at_their_step(story) -> None:
    told = story(tensorboard=tensorboard())
    told.step(1)
    told.step(2)
    told.evaluated(2, heldout_loss=1.5)
    told.end()
    assert scalars(told.run.folder, "loss") == [(1, 4.0), (2, 2.0)]
    assert scalars(told.run.folder, "heldout_loss") == [(2, 1.5)]


def test_a_resumed_run_replaces_the_steps_that_were_not_committed(story) -> None:
    told = story(tensorboard=tensorboard())
    for step in (1, 2, 3):
        told.step(step)
    told.saved(2)
    again = story(tensorboard=tensorboard())
    again.loaded(2)
    again.step(3, loss=0.5)
    again.end()
    assert scalars(told.run.folder, "loss") == [(1, 4.0), (2, 2.0), (3, 0.5)]


def test_a_committed_step_is_in_the_file_before_the_run_ends(story) -> None:
    told = story(tensorboard=tensorboard())
    told.step(1)
    told.saved(1)
    assert scalars(told.run.folder, "loss") == [(1, 4.0)]
