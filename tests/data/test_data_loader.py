import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataConfig, Loader, batch_hash, combine_hashes, row_hashes, step_of_state
from data.packing import pack
from data.rows import PackedRows, RandomRows

PINNED_ORDER = [[4, 0, 3, 7], [2, 9, 6, 10], [1, 5, 8, 5]]
PINNED_HASHES = ["e4e11d249fc9dfd0", "4181584f3f0220c7", "b866f0aea3baf049", "63c62605dcaf67ff"]
CONFIG = DataConfig(source="random", sequence_length=8, batch_size=4, seed=7)


def make_rows(num_rows: int = 11) -> PackedRows:
    """Row i of eight pairs holds the tokens 8i to 8i + 7, one document."""
    stream = np.arange(num_rows * 8 + 1, dtype=np.uint16)
    index = pack(np.asarray([0, num_rows * 8]), 8, "best_fit")
    return PackedRows(stream, index, {"corpus": "c", "sequence_length": 8, "packing": "best_fit"})


def take(loader: Loader, count: int) -> list[tuple[int, dict[str, np.ndarray]]]:
    with loader:
        return list(itertools.islice(loader, count))


def row_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    return (batch["tokens"][:, 0] // 8).tolist()


def test_each_epoch_is_another_order_of_all_rows():
    batches = take(Loader(make_rows(), CONFIG), 11)  # 44 samples, four epochs; batches span their ends
    assert [step for step, _ in batches] == list(range(11))
    order = [number for _, batch in batches for number in row_numbers(batch)]
    epochs = [order[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = take(Loader(make_rows(), dataclasses.replace(CONFIG, seed=100)), 11)
    assert [n for _, batch in other for n in row_numbers(batch)] != order


def test_stream_is_pinned():
    """The order is part of what a checkpoint relies on: a new Grain or an edit here must not change it unnoticed."""
    batches = take(Loader(make_rows(), CONFIG), 3)
    assert [row_numbers(batch) for _, batch in batches] == PINNED_ORDER
    random = take(Loader(RandomRows(8, 50, seed=7), CONFIG), 1)
    assert [batch_hash(batch) for _, batch in (*batches, *random)] == PINNED_HASHES


@settings(deadline=None, max_examples=15)
@given(process_count=st.sampled_from([1, 2, 3, 4, 6, 12]), start=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_stream_is_the_same_for_any_hosts_and_start(process_count, start, seed):
    config = dataclasses.replace(CONFIG, batch_size=12, seed=seed)
    whole = take(Loader(make_rows(17), config), 12)[start:]
    hosts = [
        take(
            Loader(make_rows(17), config, start_step=start, process_index=p, process_count=process_count),
            12 - start,
        )
        for p in range(process_count)
    ]
    for (step, batch), parts in zip(whole, zip(*hosts, strict=True), strict=True):
        assert {s for s, _ in parts} == {step}
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for _, part in parts]), array)
        assert combine_hashes(np.concatenate([row_hashes(part) for _, part in parts])) == batch_hash(batch)


def test_resume_continues_where_the_state_was_taken():
    whole = [batch_hash(batch) for _, batch in take(Loader(make_rows(), CONFIG), 9)]
    with Loader(make_rows(), CONFIG) as loader:
        first = [batch_hash(batch) for _, batch in itertools.islice(loader, 4)]
        state = json.loads(json.dumps(loader.state()))  # what is prefetched does not count
    start = step_of_state(state, make_rows(), CONFIG)
    rest = take(Loader(make_rows(), CONFIG, start_step=start), 5)
    assert [step for step, _ in rest] == [4, 5, 6, 7, 8]
    assert first + [batch_hash(batch) for _, batch in rest] == whole


def test_finite_epochs_end_at_the_last_full_batch_on_every_host():
    config = dataclasses.replace(CONFIG, epochs=2)  # 22 samples: 5 batches of 4
    for process_count in (1, 2, 4):
        for p in range(process_count):
            loader = Loader(make_rows(), config, process_index=p, process_count=process_count)
            assert loader.num_steps == 5
            assert [step for step, _ in take(loader, 100)] == [0, 1, 2, 3, 4]
    assert take(Loader(make_rows(), config, start_step=5), 100) == []
    assert Loader(make_rows(), CONFIG).num_steps is None
    with pytest.raises(ValueError, match=r"11 rows .* data.epochs=2 do not fill data.batch_size=32"):
        Loader(make_rows(), dataclasses.replace(config, batch_size=32))


def test_batch_larger_than_the_corpus_repeats_it():
    ((_, batch),) = take(Loader(make_rows(3), CONFIG), 1)
    assert batch["tokens"].shape == (4, 8)
    assert set(row_numbers(batch)[:3]) == {0, 1, 2}


def test_state_of_another_stream_is_refused():
    rows = make_rows()
    with Loader(rows, CONFIG) as loader:
        state = loader.state()
    assert step_of_state(state, rows, CONFIG) == 0
    with pytest.raises(ValueError, match=r"seed: 7 then, 8 now"):
        step_of_state(state, rows, dataclasses.replace(CONFIG, seed=8))
    with pytest.raises(ValueError, match=r"batch_size: 4 then, 2 now"):
        step_of_state(state, rows, dataclasses.replace(CONFIG, batch_size=2))
    other = dataclasses.replace(rows, identity={**rows.identity, "corpus": "d"})
    with pytest.raises(ValueError, match=r"corpus: 'c' then, 'd' now"):
        step_of_state(state, other, CONFIG)
    with pytest.raises(ValueError, match=r"has no next_step"):
        step_of_state({k: v for k, v in state.items() if k != "next_step"}, rows, CONFIG)


def test_batch_must_divide_over_hosts():
    with pytest.raises(ValueError, match=r"data.batch_size=4 is not divisible by the 3 hosts"):
        Loader(make_rows(), CONFIG, process_count=3)


class BrokenRows(RandomRows):
    """Fails at every row."""

    def __getitem__(self, index):
        raise OSError("disk gone")


class CountingRows(RandomRows):
    """Counts the rows read."""

    reads = 0

    def __getitem__(self, index):
        type(self).reads += 1
        return super().__getitem__(index)


def test_error_in_the_background_reaches_the_caller():
    with Loader(BrokenRows(8, 50, 0), CONFIG) as loader, pytest.raises(OSError, match="disk gone"):
        next(loader)


def test_prefetch_is_bounded():
    CountingRows.reads = 0
    with Loader(CountingRows(8, 50, 0), dataclasses.replace(CONFIG, prefetch=3)) as loader:
        next(loader)
        wait_until(lambda: CountingRows.reads == 16)  # one batch taken, three ahead
        time.sleep(0.1)
        assert CountingRows.reads == 16


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    loader = Loader(make_rows(), CONFIG)
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    loader.close()
    wait_until(lambda: not any(thread.is_alive() for thread in started))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_hash_sees_each_array_and_ignores_width():
    ((_, batch),) = take(Loader(make_rows(), CONFIG), 1)
    base = batch_hash(batch)
    assert batch_hash({name: batch[name] for name in reversed(batch)}) == base
    assert batch_hash({**batch, "tokens": batch["tokens"].astype(np.int64)}) == base
    for name, array in batch.items():
        changed = array.copy()
        changed[-1, -1] += 1
        assert batch_hash({**batch, name: changed}) != base
    assert batch_hash({name: array[::-1] for name, array in batch.items()}) != base  # the order of rows counts
