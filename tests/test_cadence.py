"""When a run does what: in steps, in epochs, at the end alone, or not at all."""

import make
import pytest

from run import cadence


def when(*words, records=7 * 128, evaluates=True):
    config = make.config(*(f"training.{word}" for word in words), name="digits")
    return cadence.of_run(config.training, evaluates, records)


def due(what, steps=20):
    return [step for step in range(1, steps + 1) if what.due(step)]


def test_steps_come_before_epochs_and_the_end_counts_always():
    found = when("num_steps=20", "checkpoint_per_step=6", "checkpoint_per_epoch=1",
                 "sample_per_epoch=1", "fid_per_epoch=0", "ema_snapshot_per_epoch=2",
                 "ema_sigma=0.1,0.05", "log_per_step=8")  # fmt: skip
    assert (found.steps_per_epoch, found.total) == (7, 20)
    assert due(found.checkpoint) == [6, 12, 18, 20] and due(found.grid) == [7, 14, 20]
    assert due(found.evaluation) == [20] and due(found.snapshot) == [14, 20]
    assert due(found.metrics) == [8, 16, 20]


def test_a_checkpoint_comes_before_an_evaluation():
    found = when("num_steps=20", "checkpoint_per_step=9", "fid_per_step=4")
    assert [step for step in range(1, 21) if found.saves(step)] == [4, 8, 9, 12, 16, 18, 20]


def test_what_is_switched_off_is_never_due():
    found = when("num_steps=0", "num_epochs=2", "sample_on_training=false", evaluates=False)
    assert found.total == 14
    for what in (found.grid, found.evaluation, found.snapshot):
        assert not what.on and due(what) == []


def test_more_steps_than_are_counted_are_refused():
    with pytest.raises(ValueError, match="training.num_epochs: .* more than 32 bits can count"):
        when("num_steps=0", "num_epochs=999999999")
