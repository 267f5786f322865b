import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing
from data.packing import best_fit_decreasing, pack
from data.rows import EvaluationBatches, PackedRows, RandomRows

END = 0


def stream_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    stream = [END]
    for document in documents:
        stream += [*document, END]
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)])
    return np.asarray(stream, np.uint16), offsets


def rows_of(documents: list[list[int]], length: int, kind: str) -> PackedRows:
    stream, offsets = stream_of(documents)
    identity = {"corpus": "c", "sequence_length": length, "packing": kind}
    return PackedRows(stream, pack(offsets, length, kind), identity)


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different, so that each pair can be told from every other."""
    ids = iter(range(1, 65536))
    return [[next(ids) for _ in range(size)] for size in sizes]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    length=st.integers(1, 17),
    kind=st.sampled_from(["best_fit", "concatenate"]),
    window=st.integers(1, 50),
)
def test_every_pair_of_every_document_once(sizes, length, kind, window):
    documents = numbered(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WINDOW", window)
        rows = rows_of(documents, length, kind)
    wanted = sorted(pair for d in documents for pair in zip([END, *d], [*d, END], strict=True))
    found = []
    for i in range(len(rows)):
        row = rows[i]
        assert {name: (a.dtype.name, a.shape) for name, a in row.items()} == {
            **{n: ("int32", (length,)) for n in ("tokens", "targets", "segments", "positions")},
            "weights": ("float32", (length,)),
        }
        real = row["weights"] == 1
        found += zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True)
        check_segments(row, real)
    assert sorted(found) == wanted
    assert rows.num_tokens == len(wanted)
    assert rows.index.efficiency == pytest.approx(len(wanted) / (len(rows) * length))


def check_segments(row, real):
    """Padding at the end only; segments 1, 2, … in order; positions from 0; a target is the segment's next token."""
    count = int(real.sum())
    assert count and real[:count].all()
    for name in ("tokens", "targets", "segments", "positions", "weights"):
        assert not row[name][count:].any()
    segments = row["segments"][:count]
    assert segments[0] == 1 and set(np.diff(segments).tolist()) <= {0, 1}
    for segment in np.unique(segments):
        inside = row["segments"] == segment
        tokens, targets = row["tokens"][inside], row["targets"][inside]
        np.testing.assert_array_equal(row["positions"][inside], np.arange(len(tokens)))
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        assert END not in tokens[1:]  # one document only


def test_short_documents_stay_whole_with_best_fit():
    documents = numbered([7, 3, 5, 9, 2, 4, 1, 6])
    rows = rows_of(documents, 10, "best_fit")
    segments = sum(int(rows[i]["segments"].max()) for i in range(len(rows)))
    assert segments == len(documents)
    assert len(rows) == 5  # 45 pairs: nothing does better


def test_concatenation_fills_every_row_but_the_last():
    rows = rows_of(numbered([7, 13, 5]), 4, "concatenate")
    assert [int(rows[i]["weights"].sum()) for i in range(len(rows))] == [4] * 7
    assert len(rows_of(numbered([7, 13, 6]), 4, "concatenate")) == 8


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_equals_the_plain_search(lengths):
    rows: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for piece in order:
        rooms = [30 - sum(lengths[i] for i in row) for row in rows]
        fitting = [room for room in rooms if room >= lengths[piece]]
        if fitting:
            rows[rooms.index(min(fitting))].append(piece)
        else:
            rows.append([piece])
    found = best_fit_decreasing(np.asarray(lengths, np.int64), 30)
    # Which of equally full rows is taken is free; how full the rows come out is not.
    assert sorted(sum(lengths[i] for i in row) for row in found) == sorted(sum(lengths[i] for i in row) for row in rows)
    assert sorted(i for row in found for i in row) == list(range(len(lengths)))


def test_packing_streams_in_windows(monkeypatch):
    sizes = np.random.default_rng(0).integers(1, 300, 2000).tolist()
    offsets = np.cumsum([0, *sizes])
    monkeypatch.setattr(packing, "_WINDOW", 500)
    whole, half = pack(offsets, 256, "best_fit"), pack(offsets[:1001], 256, "best_fit")
    assert whole.efficiency > 0.98
    # What has been packed does not depend on what follows.
    np.testing.assert_array_equal(whole.row_offsets[: len(half) + 1], half.row_offsets)
    np.testing.assert_array_equal(whole.starts[: len(half.starts)], half.starts)


@pytest.mark.parametrize("kind", ["best_fit", "concatenate"])
def test_no_documents_no_rows(kind):
    index = pack(np.asarray([0]), 8, kind)
    assert len(index) == 0 and index.efficiency == 0


def test_row_index_out_of_range():
    rows = rows_of(numbered([3]), 8, "best_fit")
    with pytest.raises(IndexError, match="row 1 of 1"):
        rows[1]
    with pytest.raises(IndexError, match="row -1"):
        rows[-1]


def test_evaluation_covers_every_row_once_in_order():
    rows = rows_of(numbered([9, 30, 2, 14, 8]), 8, "concatenate")
    whole = list(EvaluationBatches(rows, 4))
    assert len(whole) == len(EvaluationBatches(rows, 4)) == 3
    assert all(array.shape == (4, 8) for batch in whole for array in batch.values())
    assert sum(float(batch["weights"].sum()) for batch in whole) == rows.num_tokens
    for process_count in (2, 4):
        hosts = [list(EvaluationBatches(rows, 4, p, process_count)) for p in range(process_count)]
        for batch, parts in zip(whole, zip(*hosts, strict=True), strict=True):
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    with pytest.raises(ValueError, match=r"data.batch_size=4 is not divisible by the 3 hosts"):
        EvaluationBatches(rows, 4, 0, 3)


def test_random_rows_are_a_function_of_seed_and_index():
    rows = RandomRows(64, 100, seed=3)
    row = rows[12345]
    np.testing.assert_array_equal(row["tokens"], RandomRows(64, 100, seed=3)[12345]["tokens"])
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
    assert not np.array_equal(row["tokens"], rows[12346]["tokens"])
    assert not np.array_equal(row["tokens"], RandomRows(64, 100, seed=4)[12345]["tokens"])
    tokens = np.concatenate([rows[i]["tokens"] for i in range(200)])
    assert tokens.min() == 0 and tokens.max() == 99
    assert np.bincount(tokens).min() > 60  # 128 expected of each
    assert row["weights"].all() and (row["segments"] == 1).all()
