"""Goodput: exclusive buckets that sum to wall time, attempts that accumulate, lost work, torn files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf.goodput import BUCKETS, FILE_NAME, GoodputLedger, read_goodput

OPENABLE = tuple(name for name in BUCKETS if name != "lost_work")


class Clock:
    """Nanoseconds that pass when told to; also the Unix clock, in seconds."""

    def __init__(self, now=0):
        self.now = now

    def __call__(self):
        return self.now

    def unix(self):
        return self.now / 1e9

    def sleep(self, seconds):
        self.now += round(seconds * 1e9)


LEDGERS = []


@pytest.fixture(autouse=True)
def close_files():
    """The files of ledgers that a test killed."""
    yield
    while LEDGERS:
        file = LEDGERS.pop()._file
        if file is not None:
            file.close()


def open_ledger(run_dir, clock, **settings):
    LEDGERS.append(GoodputLedger(run_dir, clock=clock, wall_clock=clock.unix, **settings))
    return LEDGERS[-1]


# A tree of buckets: (name, nanoseconds before each child and after the last, children).
TREES = st.recursive(
    st.tuples(st.sampled_from(OPENABLE), st.lists(st.integers(0, 10**9), min_size=1, max_size=1), st.just([])),
    lambda children: st.lists(children, max_size=3).flatmap(
        lambda nodes: st.tuples(
            st.sampled_from(OPENABLE),
            st.lists(st.integers(0, 10**9), min_size=len(nodes) + 1, max_size=len(nodes) + 1),
            st.just(nodes),
        )
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=80)
@given(forest=st.lists(st.tuples(st.integers(0, 10**9), TREES), max_size=5), tail=st.integers(0, 10**9))
def test_buckets_are_exclusive_and_sum_to_wall_time(forest, tail):
    clock = Clock(now=17)
    ledger = open_ledger(None, clock)
    expected = dict.fromkeys(BUCKETS, 0)

    def run(node):
        name, gaps, children = node
        with ledger.bucket(name):
            for gap, child in zip(gaps, [*children, None], strict=True):
                clock.now += gap
                expected[name] += gap
                if child is not None:
                    run(child)

    for pause, node in forest:
        clock.now += pause
        expected["other"] += pause
        run(node)
    clock.now += tail
    expected["other"] += tail
    assert ledger.attempt_nanoseconds() == expected
    assert sum(expected.values()) == clock.now - 17 == ledger.summary().wall_nanoseconds


def test_an_exception_closes_its_bucket():
    clock = Clock()
    ledger = open_ledger(None, clock)
    with pytest.raises(RuntimeError), ledger.bucket("step"), ledger.bucket("eval"):
        clock.sleep(2)
        raise RuntimeError
    clock.sleep(3)
    spent = ledger.attempt_nanoseconds()
    assert spent["eval"] == 2 * 10**9 and spent["other"] == 3 * 10**9


def test_time_since_the_process_started_is_startup():
    clock = Clock(now=5 * 10**9)
    ledger = open_ledger(None, clock, started_ns=10**9)
    assert ledger.attempt_nanoseconds()["startup"] == 4 * 10**9


@pytest.mark.parametrize("name", ["steps", "lost_work"])
def test_unknown_buckets_are_refused(name):
    with (
        pytest.raises(ValueError, match=f"'{name}' is not one of startup, compile"),
        open_ledger(None, Clock()).bucket(name),
    ):
        pass


def attempt(run_dir, clock, steps, *, resume=None, startup=1.0, step_seconds=1.0):
    """An attempt that starts, resumes after step `resume`, runs `steps` and is killed: nothing is closed."""
    ledger = open_ledger(run_dir, clock)
    with ledger.bucket("startup"):
        clock.sleep(startup)
    if resume is not None:
        ledger.resumed(resume)
    for step in steps:
        with ledger.bucket("step"):
            clock.sleep(step_seconds)
        ledger.step_done(step)
    return ledger


def seconds(goodput, name):
    return goodput.nanoseconds[name] / 1e9


def test_goodput_of_one_attempt(tmp_path):
    clock = Clock()
    with attempt(tmp_path, clock, range(1, 9), startup=2.0) as ledger:
        pass
    for goodput in (ledger.summary(), read_goodput(tmp_path)):
        assert goodput.goodput == pytest.approx(0.8)
        assert goodput.attempts == 1 and goodput.between_attempts_seconds == 0
    record = ledger.summary().record()
    assert record["goodput_wall_seconds"] == 10 == sum(record[f"goodput_{name}_seconds"] for name in BUCKETS)
    assert record["goodput_step_seconds"] == 8 and record["goodput_startup_seconds"] == 2
    json.dumps(record)


def test_steps_after_the_last_checkpoint_of_a_killed_attempt_are_lost(tmp_path):
    clock = Clock()
    attempt(tmp_path, clock, range(1, 11))  # 10 s of steps; the checkpoint holds step 7.
    clock.sleep(30)
    ledger = attempt(tmp_path, clock, range(8, 15), resume=7, step_seconds=2.0)
    goodput = ledger.summary()
    assert goodput.attempts == 2
    assert seconds(goodput, "lost_work") == 3
    assert seconds(goodput, "step") == 7 + 7 * 2
    assert goodput.wall_nanoseconds == (1 + 10 + 1 + 14) * 10**9
    assert goodput.goodput == pytest.approx(21 / 26)
    assert goodput.between_attempts_seconds == pytest.approx(30)
    assert read_goodput(tmp_path).nanoseconds == goodput.nanoseconds


def test_an_attempt_that_got_no_further_loses_its_steps_too(tmp_path):
    clock = Clock()
    attempt(tmp_path, clock, range(1, 11))
    attempt(tmp_path, clock, range(9, 12), resume=8)  # Killed before its first checkpoint.
    attempt(tmp_path, clock, [])  # Killed during start-up: says nothing about checkpoints.
    ledger = attempt(tmp_path, clock, range(9, 13), resume=8)
    goodput = ledger.summary()
    assert seconds(goodput, "lost_work") == 2 + 3
    assert seconds(goodput, "step") == 8 + 4
    assert goodput.attempts == 4 and seconds(goodput, "startup") == 4


def test_starting_over_loses_everything(tmp_path):
    clock = Clock()
    attempt(tmp_path, clock, range(1, 6))
    ledger = attempt(tmp_path, clock, range(1, 3), resume=0)
    assert seconds(ledger.summary(), "lost_work") == 5 and seconds(ledger.summary(), "step") == 2


def test_a_step_cut_short_is_lost_with_its_attempt(tmp_path):
    clock = Clock()
    first = attempt(tmp_path, clock, range(1, 4))
    with first.bucket("step"):
        clock.sleep(0.5)
    with first.bucket("checkpoint"):
        clock.sleep(1)  # This bucket's line carries the half step too.
    ledger = attempt(tmp_path, clock, [4], resume=3)
    assert seconds(ledger.summary(), "lost_work") == 0.5
    assert seconds(ledger.summary(), "step") == 4


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_all_attempts_sum_to_their_wall_time(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    clock = Clock()
    worked, reached, ledger = 0.0, 0, None
    for _ in range(data.draw(st.integers(1, 4))):
        resume = data.draw(st.integers(0, reached))
        steps = range(resume + 1, resume + 1 + data.draw(st.integers(0, 5)))
        ledger = attempt(run_dir, clock, steps, resume=resume)
        worked += 1 + len(steps)
        reached = steps[-1] if steps else resume
        clock.sleep(data.draw(st.integers(0, 5)))
    ledger.close()
    goodput = read_goodput(run_dir)
    assert goodput.nanoseconds == ledger.summary().nanoseconds
    # What counts is exactly one second for each step on the way to the last one; the rest of the steps is lost.
    assert seconds(goodput, "step") == reached
    tail = seconds(goodput, "other")  # From the last step to close().
    assert goodput.wall_nanoseconds / 1e9 == pytest.approx(worked + tail)


def test_half_a_line_at_the_end_of_an_attempt_is_skipped(tmp_path):
    clock = Clock()
    attempt(tmp_path, clock, range(1, 4))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-9])  # Killed while writing the line of step 3.
    ledger = attempt(tmp_path, clock, [3], resume=2)
    assert seconds(ledger.summary(), "step") == 3 and seconds(ledger.summary(), "lost_work") == 0
    assert read_goodput(tmp_path).attempts == 2


def test_a_damaged_file_is_refused_with_its_line(tmp_path):
    attempt(tmp_path, Clock(), range(1, 4))
    path = tmp_path / FILE_NAME
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:5]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"goodput.jsonl line 3 .* move the file away"):
        open_ledger(tmp_path, Clock())


def test_no_time_has_no_goodput():
    record = open_ledger(None, Clock()).summary().record()
    assert record["goodput"] is None and "no time" in record["goodput_reason"]


def test_a_directory_without_attempts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no attempts"):
        read_goodput(tmp_path)
