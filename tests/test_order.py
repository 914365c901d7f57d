"""The order of the records: as it was for small sets, without memory for large ones."""

import json

import numpy as np
import pytest

from utils import order
from utils.iterator import RecordIterator


def epoch_of(number, count, seed=0, keyed=True):
    return order.shuffled_indices(number * count, (number + 1) * count, count, seed, keyed)


def test_small_sets_keep_their_order():
    """What runs have been trained on; of numpy's generator that never changes."""
    assert order.shuffled_indices(0, 10, 10, seed=3).tolist() == [9, 4, 5, 8, 3, 7, 0, 1, 2, 6]
    for epoch in range(2):
        key = np.random.SeedSequence([3, epoch]).generate_state(8)
        expected = np.random.RandomState(key).permutation(1000)
        np.testing.assert_array_equal(epoch_of(epoch, 1000, seed=3, keyed=False), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 12, 64, 65, 1000, 10007])
def test_each_epoch_has_each_record_once(count):
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(epoch_of(epoch, count)), np.arange(count))


def test_any_place_is_found_at_once():
    whole = np.concatenate([epoch_of(epoch, 1000, seed=5) for epoch in range(3)])
    for start, stop in ((0, 1), (990, 1010), (1000, 1256), (1, 2999)):
        found = order.shuffled_indices(start, stop, 1000, 5, keyed=True)
        np.testing.assert_array_equal(found, whole[start:stop])
    far = order.shuffled_indices(10**18, 10**18 + 256, 10**9, 0, keyed=True)
    assert len(set(far.tolist())) == 256 and 0 <= far.min() and far.max() < 10**9


def test_order_is_well_mixed():
    """As of independent draws: correlations, and how many of a batch lie close together."""
    count = 20000
    first, second, other = epoch_of(0, count), epoch_of(1, count), epoch_of(0, count, seed=1)
    for a, b in (
        (first, np.arange(count)), (first[1:], first[:-1]), (first[2:], first[:-2]),
        (first, second), (first, other),
    ):  # fmt: skip
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / count**0.5
    fixed = [np.sum(order == np.arange(count)) for order in (first, second, other)]
    assert max(fixed) < 8  # one is expected
    steps = np.abs(np.diff(first))
    assert np.sum(steps < 100) == pytest.approx(200, abs=60)  # of 2 * 100 / count
    tenths = np.histogram(first[:2000], bins=10, range=(0, count))[0]
    assert abs(tenths - 200).max() < 60


def test_a_run_goes_on_in_the_order_it_began_with(monkeypatch):
    """A place that was saved before large sets had an order of their own says nothing of it."""
    records = type("Records", (), dict(num_records=12, read=lambda self, i, flipped: i))()
    before = RecordIterator(records, 4, seed=1, num_workers=0)
    old = [next(before) for _ in range(6)]
    monkeypatch.setattr(order, "LARGE", 10)
    fresh = RecordIterator(records, 4, seed=1, num_workers=0)
    new = [next(fresh) for _ in range(6)]
    assert not np.array_equal(old, new)
    place = json.loads(json.dumps(fresh.get_state()))
    again = RecordIterator(records, 4, seed=1, num_workers=0)
    again.set_state({"position": 8, "seed": 1, "num_records": 12})
    np.testing.assert_array_equal([next(again) for _ in range(4)], old[2:])
    assert "keyed" not in again.get_state()
    again.set_state(place | {"position": 8})
    np.testing.assert_array_equal([next(again) for _ in range(4)], new[2:])


def test_the_places_are_spread_and_always_the_same():
    places = order.spread(1_000_000, 64)
    np.testing.assert_array_equal(places, order.spread(1_000_000, 64))
    assert (np.diff(places) > 0).all() and (places // 15_625 == np.arange(64)).all()
    # Classes in turn: equal steps of 100 would meet one of 10.
    assert len(set((order.spread(6400, 64) % 10).tolist())) == 10
    np.testing.assert_array_equal(order.spread(5, 64), np.arange(5))
