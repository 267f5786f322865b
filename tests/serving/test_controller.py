"""The draft length that pays off is found, kept to, and left again when acceptance or times change."""

import itertools
import random

import pytest

from serving.controller import DraftController, expected_tokens

LENGTHS = range(5)
SIZES = (1, 4, 16, 64)


def step_time(batch: int, length: int) -> float:
    """Seconds: reading the weights, plus arithmetic that grows with the tokens, plus the draft model."""
    return 5e-3 + 6e-5 * batch * (length + 1) + 3e-4 * length


class World:
    """A controller in a machine of known step times and acceptance."""

    def __init__(self, acceptance, *, time=step_time, coverage=1.0, warm=True, seed=0, **options):
        self.controller = DraftController(LENGTHS, SIZES, **options)
        self.acceptance, self.time, self.coverage = acceptance, time, coverage
        self.random = random.Random(seed)
        self.seconds = self.tokens = 0.0
        if warm:
            for size in SIZES:
                for length in LENGTHS:
                    self.controller.record_time(size, length, self.time(size, length))

    def run(self, batch: int, steps: int) -> list[int]:
        chosen = []
        for _ in range(steps):
            length = self.controller.choose(batch)
            drafted = [length if self.random.random() < self.coverage else 0 for _ in range(batch)]
            accepted = [self.accept(n) for n in drafted]
            size = next(s for s in SIZES if s >= batch)
            seconds = self.time(size, length) * self.random.uniform(0.97, 1.03)
            self.controller.update(batch, length, drafted, accepted, seconds)
            self.seconds += seconds
            self.tokens += batch + sum(accepted)
            chosen.append(length)
        return chosen

    def accept(self, drafted: int) -> int:
        accepted = 0
        while accepted < drafted and self.random.random() < self.acceptance:
            accepted += 1
        return accepted

    def rate(self, batch: int, length: int) -> float:
        """Tokens per second of always drafting so much."""
        gain = 1 + self.coverage * (expected_tokens(self.acceptance, length) - 1)
        return batch * gain / self.time(next(s for s in SIZES if s >= batch), length)


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.97])
def test_it_comes_near_the_best_length(batch, acceptance):
    world = World(acceptance)
    world.run(batch, 400)
    world.seconds = world.tokens = 0.0
    world.run(batch, 4000)
    best = max(world.rate(batch, length) for length in LENGTHS)
    # 2% for trying other lengths; the rest is the noise of the tokens themselves.
    assert world.tokens / world.seconds > best * 0.97


def test_the_choice_follows_from_times_and_acceptance():
    """At a high load drafts cost too much; at low acceptance they bring too little."""
    tail = {
        key: World(p).run(batch, 600)[-200:]
        for key, (p, batch) in {
            "accepted, alone": (0.9, 1),
            "rejected, alone": (0.02, 1),
            "accepted, loaded": (0.3, 64),
        }.items()
    }
    usual = {key: max(set(chosen), key=chosen.count) for key, chosen in tail.items()}
    assert usual == {"accepted, alone": 4, "rejected, alone": 0, "accepted, loaded": 0}


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_trying_costs_less_than_two_percent(batch):
    """Even where no draft is ever accepted, so that every trial is lost."""
    world = World(0.0)
    world.run(batch, 500)
    world.seconds = world.tokens = 0.0
    chosen = world.run(batch, 5000)
    plain = batch / step_time(batch, 0)
    assert any(chosen), "acceptance is never measured again"
    assert world.tokens / world.seconds > plain * 0.98
    lost = sum(step_time(batch, length) - step_time(batch, 0) for length in chosen)
    assert lost < 0.0105 * world.seconds + 5 * step_time(batch, 4)


def test_trials_keep_their_distance():
    chosen = World(0.0).run(1, 2000)[500:]
    trials = [step for step, length in enumerate(chosen) if length]
    assert trials and min(b - a for a, b in itertools.pairwise(trials)) >= 32


def test_without_exploration_there_is_none():
    controller = World(0.0, explore_share=0.0).controller
    for _ in range(100):
        controller.update(1, 4, [4], [0], step_time(1, 4))
    for _ in range(3000):
        assert controller.choose(1) == 0
        controller.update(1, 0, [0], [0], step_time(1, 0))


def test_it_notices_that_acceptance_has_risen():
    world = World(0.0)
    assert world.run(1, 1500)[-1] == 0
    world.acceptance = 0.9
    chosen = world.run(1, 12_000)
    assert sum(chosen[-500:]) / 500 > 3.5


def test_it_notices_that_acceptance_has_fallen():
    world = World(0.95)
    assert sum(world.run(1, 300)[-100:]) > 350
    world.acceptance = 0.0
    assert sum(world.run(1, 600)[-100:]) < 20


def test_it_notices_that_drafts_have_become_dear():
    """The table of warm-up is refined by the steps themselves."""
    world = World(0.6)
    assert sum(world.run(1, 300)[-100:]) > 150
    world.time = lambda batch, length: step_time(batch, length) * (1 + 2 * length)
    assert sum(world.run(1, 800)[-100:]) < 20


def test_a_pause_of_the_machine_changes_no_choice():
    world = World(0.9, explore_share=0.0)
    before = world.run(1, 200)[-1]
    world.controller.update(1, before, [before], [before], 3.0)
    assert world.controller.choose(1) == before


def test_drafts_that_are_seldom_found_are_worth_less():
    always, seldom = (World(0.6, coverage=c) for c in (1.0, 0.05))
    assert sum(always.run(4, 600)[-100:]) > 3 * sum(seldom.run(4, 600)[-100:])
    assert seldom.controller.coverage < 0.15 and always.controller.coverage == pytest.approx(1.0)


@pytest.mark.parametrize(("batch", "length"), [(1, 4), (15, 4), (16, 0), (64, 0)])
def test_the_prior_before_any_measurement(batch, length):
    assert DraftController(LENGTHS, SIZES).choose(batch) == length


def test_missing_times_are_filled_by_trials():
    world = World(0.5, warm=False)
    world.run(16, 12_000)
    assert world.controller._measured(16) == list(LENGTHS)
    best = max(LENGTHS, key=lambda length: world.rate(16, length))
    chosen = world.run(16, 200)
    assert max(set(chosen), key=chosen.count) == best


def test_the_smallest_compiled_batch_is_asked():
    controller = DraftController(LENGTHS, SIZES)
    for size, times in {4: (1.0, 0.9, 2.0, 2.0, 2.0), 16: (1.0, 9.0, 9.0, 9.0, 9.0)}.items():
        for length, seconds in enumerate(times):
            controller.record_time(size, length, seconds)
    assert [controller.choose(batch) for batch in (2, 3, 4, 5, 16)] == [1, 1, 1, 0, 0]


def test_stats():
    controller = DraftController(LENGTHS, SIZES)
    assert controller.stats.tokens_per_round == controller.stats.expected_tokens_per_round == 0
    for _ in range(2):
        controller.update(4, 0, [0] * 4, [0] * 4, 0.01)
    # Three rows of two drafts and one that found none: 2, 1, 0 accepted of 2 + 2 + 1 looked at.
    controller.update(4, 2, [2, 2, 2, 0], [2, 1, 0, 0], 0.02)
    stats = controller.stats
    assert (stats.drafted, stats.accepted, stats.rounds, stats.emitted, stats.plain_rounds) == (6, 3, 4, 7, 8)
    assert stats.acceptance == pytest.approx(3 / 5) and stats.tokens_per_round == 7 / 4
    assert stats.expected_tokens_per_round == pytest.approx((3 * (1 - 0.6**3) / 0.4 + 1) / 4)


def test_expected_tokens_are_observed():
    world = World(0.7)
    world.run(4, 3000)
    stats = world.controller.stats
    assert stats.acceptance == pytest.approx(0.7, abs=0.02)
    assert stats.tokens_per_round == pytest.approx(stats.expected_tokens_per_round, rel=0.02)
    assert world.controller.acceptance == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize(("p", "length", "tokens"), [(0.0, 4, 1), (1.0, 4, 5), (0.5, 2, 1.75), (0.9, 0, 1)])
def test_expected_tokens(p, length, tokens):
    assert expected_tokens(p, length) == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=(1, 2), batch_sizes=(1,)), "lengths=.1, 2. must hold 0"),
        (dict(lengths=(), batch_sizes=(1,)), "lengths"),
        (dict(lengths=(0,), batch_sizes=()), "batch_sizes"),
        (dict(lengths=(0,), batch_sizes=(1,), explore_share=1.0), "explore_share=1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DraftController(**arguments)
