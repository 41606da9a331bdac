"""The order of batches: the same joint batch for any number of processes, continued from any step."""

from __future__ import annotations

import pytest

from mwm.train.config import TrainError
from mwm.train.loader import BatchOrder, joint_batch, one_sentence

SETTINGS = dict(images=23, batch=6, seed=1, epochs=4)


def test_an_epoch_shows_no_image_twice_and_every_epoch_has_its_own_order() -> None:
    settings = {**SETTINGS, "epochs": 20}
    batches = list(BatchOrder(**settings))
    assert len(batches) == len(BatchOrder(**settings)) == 20 * 3
    epochs = [[index for batch in batches for epoch, index in batch if epoch == e] for e in range(20)]
    assert all(len(epoch) == len(set(epoch)) == 18 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert {index for epoch in epochs for index in epoch} == set(range(23))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_joint_batch_does_not_depend_on_the_number_of_processes(world_size: int) -> None:
    parts = [list(BatchOrder(**SETTINGS, rank=rank, world_size=world_size)) for rank in range(world_size)]
    joint = [[index for batch in batches for index in batch] for batches in zip(*parts, strict=True)]
    assert joint == list(BatchOrder(**SETTINGS))


@pytest.mark.parametrize("start", [0, 2, 3, 7, 12])
def test_a_later_start_gives_the_rest_of_the_batches(start: int) -> None:
    assert list(BatchOrder(**SETTINGS, start=start)) == list(BatchOrder(**SETTINGS))[start:]


def test_another_seed_gives_another_order() -> None:
    assert list(BatchOrder(**SETTINGS)) != list(BatchOrder(**{**SETTINGS, "seed": 2}))


@pytest.mark.parametrize(("images", "batch_size", "world_size", "expected"), [(100, 32, 1, 32), (20, 32, 1, 20), (21, 32, 4, 20), (100, 32, 4, 32)])
def test_a_small_data_set_is_one_batch(images: int, batch_size: int, world_size: int, expected: int) -> None:
    assert joint_batch(images, batch_size, world_size) == expected


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(TrainError, match=r"batch_size must be a multiple of the 3 processes, got 32. Take 33"):
        joint_batch(100, 32, 3)
    with pytest.raises(TrainError, match="at least one per process"):
        joint_batch(2, 4, 4)


def test_the_traceback_of_a_loader_process_is_reduced_to_its_last_sentence() -> None:
    text = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x"\nmwm.data.DataError: read: a.png is gone.'
    assert one_sentence(ValueError(text)) == "read: a.png is gone."
    assert one_sentence(ValueError("plain.")) == "plain."
