"""The scheduler over a device of integers: a position's "keys and values" are a hash of all that was read to get there,
so that any position computed from the wrong page, twice, or not at all changes every later token."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from serving.errors import QueueFull
from serving.pages import TRASH, PagePool
from serving.request import Request, SamplingParams, Sequence, State
from serving.scheduler import Plan, Scheduler, SchedulerConfig

MODULUS = 1_000_003
VOCABULARY = 5
END = 0
JUNK = -1


def continued(value: int, token: int) -> int:
    return (value * 31 + token * 17 + 7) % MODULUS


def next_token(value: int) -> int:
    # The end token is rarer than the others, so that texts get some length.
    return value // 7 % VOCABULARY or (value // 41 % 8 and 1)


def alone(prompt: tuple[int, ...], limit: int) -> list[int]:
    """The text of a request that is served by itself: until the end token or `limit` tokens in all."""
    tokens = list(prompt)
    value = 0
    for token in tokens:
        value = continued(value, token)
    while len(tokens) < limit:
        tokens.append(next_token(value))
        if tokens[-1] == END:
            break
        value = continued(value, tokens[-1])
    return tokens


class Device:
    """Slots of pages, read and written through each sequence's list of pages as a kernel would."""

    def __init__(self, pool: PagePool, seed: int) -> None:
        self.pool = pool
        self.slots = [[JUNK] * pool.page_size for _ in range(pool.num_pages)]
        self.draw = random.Random(seed)

    def write(self, pages: list[int], position: int, value: int) -> None:
        index = position // self.pool.page_size
        page = pages[index] if index < len(pages) else TRASH
        if page != TRASH:
            assert self.pool._references[page] == 1, "a shared page is written"
            assert page not in self.pool._key_of, "a page of known content is written"
        self.slots[page][position % self.pool.page_size] = value

    def step(self, tokens: list[int], pages: list[int], position: int) -> int:
        """Computes one position from all before it; returns its value."""
        value = 0
        for before in range(position):
            value = continued(value, tokens[before])
            page = pages[before // self.pool.page_size]
            assert self.slots[page][before % self.pool.page_size] == value, "a wrong key is read"
        value = continued(value, tokens[position])
        self.write(pages, position, value)
        return value

    def run(self, plan: Plan, rounds: int) -> dict[Sequence, list[int]]:
        """One call, and the rounds that follow it. As in a kernel, the pages are those at the time of the plan, so
        tokens and pages are copied."""
        outputs = {}
        for tile in plan.tiles:
            tokens, pages = list(tile.sequence.tokens), list(tile.sequence.pages)
            for position in range(tile.start, tile.start + tile.count):
                value = self.step(tokens, pages, position)
            if tile.last:
                outputs[tile.sequence] = [next_token(value)]
        for sequence in plan.decode:
            outputs[sequence] = self.decode(sequence, rounds, plan.lookahead)
        return outputs

    def decode(self, sequence: Sequence, rounds: int, lookahead: int) -> list[int]:
        tokens, pages, emitted = list(sequence.tokens), list(sequence.pages), []
        for _ in range(rounds):
            accepted = self.draw.randint(1, lookahead)
            begin = len(tokens) - 1
            for _ in range(accepted):
                position = len(tokens) - 1
                if position >= sequence.limit - 1:
                    break
                tokens.append(next_token(self.step(tokens, pages, position)))
                emitted.append(tokens[-1])
            # Rejected drafts, and rounds after the end, leave junk where later tokens will be written.
            for position in range(len(tokens) - 1, begin + lookahead):
                self.write(pages, position, JUNK)
        return emitted


class Service:
    """A scheduler, its device, and an engine that stops at the end token; checks everything after every step."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, seed: int = 0, ahead: int = 1) -> None:
        self.now = 1000.0
        self.pool = pool
        self.ahead = ahead
        """Rounds that may be with the device before any has landed."""
        self.scheduler = Scheduler(config, pool, clock=lambda: self.now)
        self.device = Device(pool, seed)
        self.sequences: dict[str, Sequence] = {}
        self.ends: Counter[str] = Counter()
        self.flights: list[tuple[Plan, dict[Sequence, list[int]]]] = []
        self.plans: list[Plan] = []
        self.rounds: list[int] = []
        """Of each plan."""
        self.most_flights = 0

    def submit(self, prompt, max_tokens=8, **fields) -> Sequence:
        name = f"request {len(self.sequences)}"
        request = Request(name, tuple(prompt), SamplingParams(max_tokens), lambda delta: None, **fields)
        sequence = self.scheduler.submit(request)
        self.sequences[name] = sequence
        return sequence

    def launch(self, lookahead: int = 1, **kinds: bool) -> Plan:
        """Plans a call and lets the device compute it; what it found is taken in by `land`."""
        running = {sequence for sequence in self.sequences.values() if sequence.state is State.RUNNING}
        plan = self.scheduler.schedule(lookahead, **kinds)
        self.check_plan(plan, lookahead, **kinds)
        assert not plan.preempted or all(tile.sequence in running for tile in plan.tiles), "admitted to be turned out"
        self.plans.append(plan)
        self.rounds.append(self.prolong(plan))
        for sequence, reason in plan.finished:
            assert sequence.finish_reason == reason
            self.ends[sequence.request.id] += 1
        if not plan.empty:
            self.flights.append((plan, self.device.run(plan, self.rounds[-1])))
            self.most_flights = max(self.most_flights, len(self.flights))
        self.check()
        return plan

    def prolong(self, plan: Plan) -> int:
        """Rounds that the plan becomes."""
        rounds = 1
        while plan.decode and not plan.tiles and rounds < self.ahead and self.scheduler.prolong(plan, rounds):
            rounds += 1
        for sequence in plan.decode:
            written = min(sequence.computed + rounds * plan.lookahead, sequence.limit - 1)
            assert len(sequence.pages) * self.pool.page_size >= written
        return rounds

    def land(self, index: int = 0) -> None:
        plan, outputs = self.flights.pop(index)
        ended = [sequence for sequence, tokens in outputs.items() if END in tokens]
        for sequence in ended:
            del outputs[sequence][outputs[sequence].index(END) + 1 :]
        self.scheduler.commit(plan, outputs)
        for sequence in outputs:
            if sequence.state is State.FINISHED:
                continue
            if sequence.tokens[-1] == END and sequence.num_generated:
                self.finish(sequence, "stop")
            elif len(sequence.tokens) == sequence.limit and self.device.draw.random() < 0.5:
                self.finish(sequence, "length")
        self.check()

    def step(self, lookahead: int = 1) -> Plan:
        plan = self.launch(lookahead)
        while self.flights:
            self.land()
        return plan

    def finish(self, sequence: Sequence, reason) -> None:
        self.scheduler.finish(sequence, reason)
        self.ends[sequence.request.id] += 1

    def drain(self, lookahead: int = 1) -> None:
        while self.flights:
            self.land()
        # A step computes at least one tile or token; preempted work is done again, each time with one rival less.
        for _ in range(3000):
            if self.scheduler.drained:
                break
            assert not self.step(lookahead).empty or self.scheduler.drained, "nothing goes on"
        assert self.scheduler.drained, "livelock"
        self.check()
        assert self.pool.num_live == 0
        assert self.ends == Counter(dict.fromkeys(self.sequences, 1)), "each request ends once"
        for sequence in self.sequences.values():
            self.check_text(sequence)

    def check_text(self, sequence: Sequence) -> None:
        text, whole = sequence.tokens, alone(sequence.request.prompt, sequence.limit)
        assert text == whole[: len(text)]
        if sequence.finish_reason == "stop" or len(text) == sequence.limit:
            assert text == whole
        elif sequence.finish_reason == "length":
            assert self.pool.pages_for(len(text)) > self.pool.capacity

    def check(self) -> None:
        self.pool.check()
        size = self.pool.page_size
        flying = {s for plan, _ in self.flights for s in (*plan.decode, *(tile.sequence for tile in plan.tiles))}
        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in self.sequences.values():
            assert sequence.state is State.RUNNING or not sequence.pages or sequence in flying
            assert sequence.computed <= len(sequence.pages) * size or sequence.state is State.FINISHED
            assert sequence.computed < len(sequence.tokens)
            for index, page in enumerate(sequence.pages):
                holders.setdefault(page, []).append((sequence, index))
        for page, held in holders.items():
            assert self.pool._references[page] == len(held)
            for sequence, index in held if len(held) > 1 else ():
                assert index == held[0][1]
                assert (index + 1) * size <= sequence.computed
                assert sequence.tokens[: (index + 1) * size] == held[0][0].tokens[: (index + 1) * size]
        assert self.pool.num_live == len(holders)
        config = self.scheduler.config
        assert self.scheduler.num_running <= config.max_sequences
        states = Counter(sequence.state for sequence in self.sequences.values())
        assert self.scheduler.num_running == states[State.RUNNING]
        assert self.scheduler.num_waiting == states[State.WAITING]

    def check_plan(self, plan: Plan, lookahead: int, *, prompts: bool = True, decode: bool = True) -> None:
        config = self.scheduler.config
        assert (prompts or not plan.tiles) and (decode or not plan.decode)
        named = [*plan.decode, *dict.fromkeys(tile.sequence for tile in plan.tiles)]
        assert len(named) == len(set(named)) <= config.max_sequences
        assert plan.lookahead in (1, lookahead)
        assert len(plan.tiles) * config.tile_tokens <= config.chunk_tokens
        position = {}
        for tile in plan.tiles:
            assert tile.start == position.get(tile.sequence, tile.sequence.computed)
            position[tile.sequence] = tile.start + tile.count
            assert 1 <= tile.count <= config.tile_tokens
            assert tile.last == (position[tile.sequence] == len(tile.sequence.tokens))
            assert tile.last or tile.count == config.tile_tokens
        flying = {s for other, _ in self.flights for s in (*other.decode, *(tile.sequence for tile in other.tiles))}
        assert not flying & set(named)
        # With a flight under way, pages may have to be waited for, and a plan need not be of both kinds.
        if flying or not (prompts and decode):
            return
        running = [s for s in self.sequences.values() if s.state is State.RUNNING]
        assert not running or min(running, key=lambda s: s.rank) in named, "the first does not go on"
        assert all(s in plan.decode for s in running if not s.prefilling and s not in position)


KINDS = ({}, {"prompts": False}, {"decode": False})
"""What a plan may be of: both, or one alone."""

CONFIG = {
    "max_sequences": 4,
    "max_queue": 1024,
    "chunk_tokens": 8,
    "tile_tokens": 4,
    "max_context": 64,
    "ageing_seconds": 10.0,
}


def service(num_pages=65, page_size=4, seed=0, prefix_cache=True, ahead=1, **fields) -> Service:
    pool = PagePool(num_pages, page_size, prefix_cache=prefix_cache)
    return Service(SchedulerConfig(**CONFIG | fields), pool, seed, ahead)


def text(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCABULARY), k=length)


def endless(length: int, generated: int, count: int = 1) -> list[list[int]]:
    """Prompts whose texts have no end token among the first `generated`."""
    prompts = (text(length, seed) for seed in itertools.count())
    return list(itertools.islice((p for p in prompts if END not in alone(tuple(p), length + generated)), count))


# Anything, in any order

CONFIGS = st.fixed_dictionaries(
    {
        "page_size": st.integers(1, 5),
        # In tokens, a few more or fewer than one sequence may have.
        "room": st.integers(24, 90),
        "max_sequences": st.integers(1, 6),
        "max_queue": st.integers(1, 8),
        "tile_tokens": st.integers(1, 6),
        "tiles": st.integers(1, 4),
        "ahead": st.sampled_from([1, 3, 4]),
        "prefix_cache": st.booleans(),
        "seed": st.integers(0, 2**32),
    }
)


def drawn_service(*, room: int, page_size: int, tiles: int, tile_tokens: int, **fields) -> Service:
    return service(
        num_pages=1 + room // page_size,
        page_size=page_size,
        chunk_tokens=tiles * tile_tokens,
        tile_tokens=tile_tokens,
        max_context=40,
        ageing_seconds=5.0,
        **fields,
    )


def try_submit(service: Service, prompt: list[int], *arguments, **fields) -> str | None:
    """The name of the request if it was taken; checks why it was not."""
    try:
        return service.submit(prompt, *arguments, **fields).request.id
    except QueueFull as error:
        assert service.scheduler.num_waiting >= service.scheduler.config.max_queue
        assert 1 <= error.retry_after <= 120
    except ValueError:
        assert service.pool.pages_for(len(prompt)) > service.pool.capacity
    return None


class Machine(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize(config=CONFIGS)
    def build(self, config):
        self.service = drawn_service(**config)

    @rule(
        target=names,
        seed=st.integers(0, 3),
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 30),
        priority=st.integers(-2, 2),
        seconds=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        grammar=st.sampled_from([None, None, None, object()]),
        count=st.integers(1, 3),
    )
    def submit(self, seed, length, max_tokens, priority, seconds, grammar, count):
        service = self.service
        deadline = None if seconds is None else service.now + seconds
        fields = {"priority": priority, "deadline": deadline, "grammar": grammar}
        names = [try_submit(service, text(length, seed), max_tokens, **fields) for _ in range(count)]
        return multiple(*filter(None, names))

    @rule(name=names)
    def cancel(self, name):
        self.service.scheduler.cancel(name)

    @rule(seconds=st.integers(0, 20))
    def wait(self, seconds):
        self.service.now += seconds

    @rule(lookahead=st.sampled_from([1, 1, 1, 3, 5]), count=st.integers(1, 8))
    def step(self, lookahead, count):
        for _ in range(count):
            self.service.step(lookahead)

    @rule(lookahead=st.sampled_from([1, 1, 3]), kinds=st.sampled_from(KINDS))
    def launch(self, lookahead, kinds):
        self.service.launch(lookahead, **kinds)

    @precondition(lambda self: self.service.flights)
    @rule()
    def land(self):
        self.service.land()

    @precondition(lambda self: self.service.flights)
    @rule()
    def fail(self):
        plan, _ = self.service.flights.pop()
        self.service.scheduler.discard(plan)

    @rule(name=consumes(names))
    def error(self, name):
        sequence = self.service.sequences[name]
        if sequence.state is not State.FINISHED:
            self.service.finish(sequence, "error")

    @invariant()
    def holds(self):
        if hasattr(self, "service"):
            self.service.check()

    def teardown(self):
        if hasattr(self, "service"):
            self.service.drain(lookahead=2)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    deadline=None, max_examples=100, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


def random_traffic(service: Service, draw: random.Random, steps: int) -> None:
    """Arrivals in bursts, prompts that begin alike or are the text so far, and everything that can go wrong."""
    names: list[str] = []
    for _ in range(steps):
        for _ in range(draw.choice([0, 0, 0, 1, 4])):
            prompt = text(draw.randint(1, 28), draw.randrange(3))
            if names and draw.random() < 0.3:
                prompt = service.sequences[draw.choice(names)].tokens[:36]
            deadline = service.now + draw.randint(1, 40) if draw.random() < 0.1 else None
            grammar = object() if draw.random() < 0.1 else None
            fields = {"priority": draw.randint(-2, 2), "deadline": deadline, "grammar": grammar}
            names += filter(None, [try_submit(service, prompt, draw.randint(1, 30), **fields)])
        if names and draw.random() < 0.04:
            service.scheduler.cancel(draw.choice(names))
        lookahead = draw.choice([1, 1, 1, 2, 5])
        if draw.random() < 0.8:
            service.step(lookahead)
        elif service.flights and draw.random() < 0.2:
            service.scheduler.discard(service.flights.pop()[0])
        else:
            service.launch(lookahead, **draw.choice(KINDS))
        service.now += draw.choice([0.0, 0.5, 2.0])


@settings(deadline=None, max_examples=300)
@given(config=CONFIGS)
def test_random_traffic(config):
    service = drawn_service(**config)
    random_traffic(service, random.Random(config["seed"]), 60)
    service.drain()


def test_random_traffic_meets_every_case():
    """The property above says nothing about a case that it does not meet."""
    met: Counter[str] = Counter()
    for seed in range(24):
        traffic = service(
            num_pages=1 + 33 // (1 + seed % 4),
            page_size=1 + seed % 4,
            max_queue=8,
            chunk_tokens=9,
            tile_tokens=3,
            max_context=40,
            ahead=3,
            seed=seed,
        )
        random_traffic(traffic, random.Random(seed), 80)
        traffic.drain()
        met["overlapping"] += traffic.most_flights > 1
        met["rounds"] += max(traffic.rounds) > 1
        for plan in traffic.plans:
            met["mixed"] += bool(plan.tiles and plan.decode)
            met["drafts"] += plan.lookahead > 1
            met["preempted"] += len(plan.preempted)
        for sequence in traffic.sequences.values():
            met[sequence.finish_reason] += 1
            met["cached"] += sequence.cached_tokens > 0
            met["pages ran out"] += sequence.finish_reason == "length" and len(sequence.tokens) < sequence.limit
            met["preempted twice"] += sequence.preemptions > 1
    cases = ("mixed", "rounds", "drafts", "preempted", "preempted twice", "pages ran out", "cached", "overlapping")
    for case in (*cases, "stop", "length", "cancelled", "deadline"):
        assert met[case] >= 3, (case, met)


# Plans


def test_a_prompt_is_computed_in_chunks_of_tiles():
    served = service(chunk_tokens=8, tile_tokens=4)
    sequence = served.submit(text(19))
    tiles = [[(t.start, t.count, t.last) for t in served.step().tiles] for _ in range(3)]
    assert tiles == [
        [(0, 4, False), (4, 4, False)],
        [(8, 4, False), (12, 4, False)],
        [(16, 3, True)],
    ]
    assert (sequence.num_generated, sequence.computed, sequence.prefilling) == (1, 19, False)
    assert sequence.first_token == served.now
    plan = served.step()
    assert (plan.tiles, plan.decode) == ((), (sequence,))
    served.drain()


def test_prompts_are_computed_beside_decoding_and_begun_ones_first():
    served = service(chunk_tokens=8, tile_tokens=4)
    (prompt,) = endless(3, 12)
    first = served.submit(prompt, 12)
    served.step()
    long, short = served.submit(text(14, 1)), served.submit(text(2, 2))
    urgent = None
    for wanted in ([long, long], [long, long], [urgent, short]):
        plan = served.step()
        assert plan.decode[0] is first
        if urgent is None:
            # Ranks above `long`, which has begun.
            urgent = served.submit(text(3, 3), priority=5)
            wanted = [long, long]
        assert [tile.sequence for tile in plan.tiles] == [urgent if s is None else s for s in wanted]
    served.drain()


def test_a_short_prompt_costs_a_whole_tile():
    served = service(chunk_tokens=8, tile_tokens=4)
    for seed in range(3):
        served.submit(text(1, seed))
    assert len(served.step().tiles) == 2
    served.drain()


def test_a_second_prompt_takes_what_the_first_computed():
    served = service()
    prompt = text(11)
    first, second = served.submit(prompt, 1), served.submit(prompt, 1)
    served.drain()
    # The first chunk was shared as soon as it was computed: both were admitted at different steps.
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)


def test_the_text_generated_before_is_not_computed_again():
    served = service()
    (prompt,) = endless(6, 8)
    first = served.submit(prompt, 7)
    served.drain()
    assert len(first.tokens) == 13
    second = served.submit([*first.tokens, 1, 2, 3], 1)
    served.drain()
    assert second.cached_tokens == 12


def test_nothing_to_do_is_an_empty_plan():
    served = service()
    assert served.scheduler.drained
    assert served.scheduler.schedule() == Plan()
    assert Plan().empty


# Rounds and lookahead


def decoding(served: Service, count: int = 1, length: int = 3, max_tokens: int = 40, **fields) -> list[Sequence]:
    """Sequences that decode, with a long way to go."""
    sequences = [served.submit(p, max_tokens, **fields) for p in endless(length, max_tokens, count)]
    while any(sequence.prefilling for sequence in sequences):
        served.step()
    return sequences


def rounds_of(served: Service) -> int:
    """Of the next plan, which has no tiles and turns no one out."""
    plan = served.step()
    assert plan.decode and (plan.tiles, plan.preempted) == ((), ())
    return served.rounds[-1]


def test_rounds_follow_when_nothing_waits():
    served = service(ahead=4)
    (sequence,) = decoding(served)
    length = len(sequence.tokens)
    assert rounds_of(served) == 4
    assert len(sequence.tokens) == length + 4


def test_no_round_follows_while_a_prompt_is_computed():
    served = service(ahead=4)
    decoding(served)
    served.submit(text(20, 7))
    for _ in range(3):
        assert served.launch().tiles
        assert not served.scheduler.prolong(served.plans[-1], 1)
        served.land()


def test_no_round_follows_where_the_host_masks_each_token():
    served = service(ahead=4)
    decoding(served)
    decoding(served, grammar=object())
    assert rounds_of(served) == 1


def test_no_round_follows_what_is_cancelled_or_overdue():
    served = service(ahead=4)
    decoding(served, 2)
    served.submit(text(4), 40, deadline=served.now + 5)
    served.step()
    plan = served.launch()
    served.now += 10
    assert not served.scheduler.prolong(plan, 1)
    served.now -= 10
    assert served.scheduler.prolong(plan, 1)
    served.scheduler.cancel("request 0")
    assert not served.scheduler.prolong(plan, 1)
    served.drain()


def test_rounds_follow_when_what_waits_has_no_row():
    served = service(ahead=4, max_sequences=2)
    decoding(served, 2)
    served.submit(text(4))
    assert (rounds_of(served), served.scheduler.num_waiting) == (4, 1)


def test_rounds_follow_when_what_waits_has_no_pages():
    served = service(ahead=4, num_pages=16)
    decoding(served)
    served.submit(text(58, 7), 1)
    assert (rounds_of(served), served.scheduler.num_waiting) == (4, 1)


def test_a_prompt_that_comes_while_rounds_are_under_way_is_computed_beside_them():
    served = service(max_sequences=2)
    (old,) = decoding(served)
    plan = served.launch()
    assert served.scheduler.prolong(plan, 1)
    new = served.submit(text(4), 40)
    assert [tile.sequence for tile in served.launch(decode=False).tiles] == [new]
    assert not served.scheduler.prolong(plan, 2)
    served.land(1)
    # It waits for the others to land, and so that they do, no further round begins.
    assert served.launch(decode=False).empty and not served.scheduler.prolong(plan, 2)
    served.land()
    assert set(served.launch(prompts=False).decode) == {old, new}
    served.drain()


def test_who_leaves_while_rounds_are_under_way_makes_room():
    served = service(max_sequences=3)
    sequences = decoding(served, 3)
    waiting = served.submit(text(4))
    plan = served.launch()
    assert served.launch(decode=False).empty and served.scheduler.prolong(plan, 1)
    served.finish(sequences[0], "cancelled")
    assert [tile.sequence for tile in served.launch(decode=False).tiles] == [waiting]
    assert not served.scheduler.prolong(plan, 2)
    served.drain()


def test_who_is_first_waits_for_pages_rather_than_giving_up_its_own():
    """The one behind it, whose turn it is to be turned out, is with the device."""
    served = service(num_pages=6, page_size=4, prefix_cache=False)
    prompts = endless(4, 20, 2)
    first = served.submit(prompts[0], 16)
    served.step()
    second = served.submit(prompts[1], 12)
    assert [tile.sequence for tile in served.launch(decode=False).tiles] == [second]
    while not (plan := served.launch(prompts=False)).empty:
        assert plan.decode == (first,)
        served.land(1)
    assert len(first.tokens) < first.limit and (first.preemptions, second.preemptions) == (0, 0)
    served.drain()
    assert first.preemptions == 0 and second.preemptions > 0


def test_no_round_follows_when_half_of_the_rows_are_gone():
    served = service(max_sequences=4)
    sequences = decoding(served, 4)
    plan = served.launch()
    served.finish(sequences[0], "cancelled")
    assert served.scheduler.prolong(plan, 1)
    served.finish(sequences[1], "cancelled")
    assert not served.scheduler.prolong(plan, 2)
    served.drain()


def test_no_round_follows_when_no_sequence_can_use_it():
    served = service(ahead=4)
    decoding(served, max_tokens=4)
    assert rounds_of(served) == 3


def test_no_round_follows_at_the_price_of_a_preemption():
    # Two pages are left: enough for the next token of both, not for the next eight.
    served = service(ahead=8, num_pages=5, prefix_cache=False)
    decoding(served, 2, length=3)
    assert 1 <= rounds_of(served) < 8


def test_pages_stay_with_those_of_a_plan_until_its_last_round_lands():
    served = service()
    first, second = decoding(served, 2)
    plan = served.scheduler.schedule()
    assert served.scheduler.prolong(plan, 1)
    served.scheduler.commit(plan, {first: [END], second: [3]}, followed=True)
    served.finish(first, "stop")
    assert first.pages and served.pool.num_live == len({*first.pages, *second.pages})
    served.scheduler.commit(plan, {second: [3]})
    assert not first.pages and second.pages
    served.scheduler.cancel(second.request.id)


def test_pages_for_what_a_round_may_write():
    served = service(page_size=2)
    (sequence,) = decoding(served)
    before = sequence.computed
    plan = served.launch(5)
    assert plan.lookahead == 5
    assert len(sequence.pages) == -(-(before + 5) // 2)
    served.drain()


def test_no_pages_past_the_limit():
    served = service(page_size=1)
    (sequence,) = decoding(served, length=3, max_tokens=5)
    served.launch(30)
    assert len(sequence.pages) == 3 + 5 - 1
    served.drain()


def test_drafts_are_given_up_before_a_sequence_is():
    served = service(num_pages=7, page_size=4, prefix_cache=False)
    decoding(served, 2, length=3)
    plan = served.step(30)
    assert (plan.lookahead, plan.preempted) == (1, ())
    served.drain()


def test_more_tokens_than_granted_is_a_fault_of_the_engine():
    served = service(page_size=1)
    (sequence,) = decoding(served)
    plan = served.scheduler.schedule(2)
    with pytest.raises(AssertionError, match="granted"):
        served.scheduler.commit(plan, {sequence: [1, 1, 1]})


# Admission and preemption


def test_admission_leaves_a_page_to_each_that_runs():
    served = service(num_pages=10, page_size=4)
    decoding(served, 1, length=4)
    # 2 of 9 pages are taken, two are to spare: 5 pages may be had.
    served.submit(text(21, 5))
    assert served.step().tiles == ()
    served.scheduler.cancel("request 1")
    served.submit(text(20, 5))
    assert served.step().tiles
    served.drain()


def test_alone_it_needs_nothing_to_spare():
    served = service(num_pages=4, page_size=4)
    sequence = served.submit(text(12), 1)
    served.drain()
    assert sequence.num_generated == 1


def test_a_long_prompt_is_not_passed_by():
    served = service(num_pages=10, page_size=4)
    decoding(served, 1, length=4, max_tokens=6)
    long = served.submit(text(30, 5))
    short = served.submit(text(2, 5))
    assert served.step().tiles == ()
    served.drain()
    assert long.started < short.started or (long.started, long.rank) < (short.started, short.rank)


def test_the_last_by_rank_gives_up_its_pages():
    served = service(num_pages=14, page_size=4, prefix_cache=False)
    prompts = endless(8, 30, 3)
    high = served.submit(prompts[0], 24, priority=1)
    older, newer = served.submit(prompts[1], 24), served.submit(prompts[2], 24)
    order = []
    while not served.scheduler.drained:
        order += served.step().preempted
        assert high.preemptions == 0
    assert order[:2] == [newer, older]
    assert served.ends.total() == 3
    for sequence in (high, older, newer):
        served.check_text(sequence)
        assert sequence.finish_reason == "length" and sequence.num_generated == 24


def test_a_preempted_sequence_keeps_its_place_and_its_tokens():
    served = service(num_pages=8, page_size=4, prefix_cache=False, ageing_seconds=1e9)
    first, second = decoding(served, 2, length=8, max_tokens=20)
    while not second.preemptions:
        served.step()
        served.now += 1
    assert second.state is State.WAITING
    assert second.num_generated > 0 and (second.computed, second.pages) == (0, [])
    served.submit(text(3))
    assert served.scheduler._waiting[0] is second
    served.drain()
    assert second.started < first.submitted + 5


def test_after_a_preemption_cached_pages_are_taken_up_again():
    served = service(num_pages=9, page_size=4)
    _, second = decoding(served, 2, length=8, max_tokens=20)
    while not second.preemptions:
        served.step()
    served.scheduler.cancel("request 0")
    plan = served.step()
    assert plan.tiles[0].sequence is second
    assert plan.tiles[0].start >= 8
    served.drain()


def test_a_sequence_that_has_every_page_ends_with_length():
    served = service(num_pages=4, page_size=4)
    (prompt,) = endless(5, 40)
    sequence = served.submit(prompt, 40)
    served.drain(lookahead=3)
    assert sequence.finish_reason == "length"
    # The token that has no page any more is part of the text.
    assert len(sequence.tokens) == 13


def test_urgent_requests_go_first():
    served = service(max_sequences=1)
    sequences = [served.submit(text(2, seed), 2, priority=priority) for seed, priority in enumerate((0, 2, 1, 2))]
    served.drain()
    served_order = [tile.sequence for plan in served.plans for tile in plan.tiles]
    assert served_order == [sequences[i] for i in (1, 3, 2, 0)]


def test_a_low_priority_is_served_under_a_stream_of_high_ones():
    served = service(max_sequences=2, ageing_seconds=10.0)
    low = served.submit(text(6, 99), 4, priority=-3)
    begin = served.now
    for seed in range(2000):
        if low.state is State.FINISHED:
            break
        if served.scheduler.num_waiting < 5:
            served.submit(text(6, seed), 4, priority=2)
        served.step()
        served.now += 0.25
    # Five steps of priority take 50 seconds; then the five that wait go first, each for some steps.
    assert 40 < low.started - begin < 60
    assert low.state is State.FINISHED


def test_without_ageing_it_would_starve():
    served = service(max_sequences=2, ageing_seconds=float("inf"))
    low = served.submit(text(6, 99), 4, priority=-3)
    for seed in range(1000):
        if served.scheduler.num_waiting < 5:
            served.submit(text(6, seed), 4, priority=2)
        served.step()
        served.now += 0.25
    assert low.state is State.WAITING


@pytest.mark.parametrize("seed", range(4))
def test_the_first_by_rank_goes_on_in_every_step(seed):
    """Where pages are scarce and all others are turned out again and again."""
    served = service(num_pages=12, page_size=2, seed=seed, max_queue=64)
    first, *_ = [served.submit(p, 12) for p in endless(6, 14, 12)]
    steps = 0
    while first.state is not State.FINISHED:
        before = len(first.tokens) + first.computed
        served.step()
        steps += 1
        assert first.state is State.FINISHED or len(first.tokens) + first.computed > before
    assert steps <= 14
    served.drain()
    assert all(len(sequence.tokens) == 18 for sequence in served.sequences.values())
    assert sum(sequence.preemptions for sequence in served.sequences.values()) > 0


# Ends


def test_a_waiting_request_is_cancelled():
    served = service(max_sequences=1)
    (running,) = decoding(served)
    waiting = served.submit(text(4))
    served.scheduler.cancel(waiting.request.id)
    assert served.step().finished == ((waiting, "cancelled"),)
    assert served.scheduler.num_waiting == 0 and running.state is State.RUNNING


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_running_request_is_cancelled(steps):
    served = service(chunk_tokens=4, prefix_cache=False)
    sequence = served.submit(endless(8, 30)[0], 30)
    for _ in range(steps):
        served.step()
    served.scheduler.cancel(sequence.request.id)
    served.scheduler.cancel(sequence.request.id)
    plan = served.step()
    assert plan.finished == ((sequence, "cancelled"),) and plan.empty
    assert served.pool.num_free == served.pool.capacity
    assert served.scheduler.drained


def test_cancelling_what_has_ended_or_never_was_does_nothing():
    served = service()
    sequence = served.submit(text(4), 1)
    served.drain()
    served.scheduler.cancel(sequence.request.id)
    served.scheduler.cancel("unknown")
    assert served.scheduler.schedule() == Plan()


def test_pages_in_flight_are_not_given_to_others():
    served = service(num_pages=6, page_size=4, prefix_cache=False)
    (sequence,) = decoding(served, length=8)
    plan = served.scheduler.schedule()
    pages = list(sequence.pages)
    served.finish(sequence, "error")
    other = served.submit(text(16, 3), 1)
    assert served.scheduler.schedule().empty
    assert (other.state, sequence.pages) == (State.WAITING, pages)
    served.scheduler.commit(plan, {sequence: [1]})
    assert (sequence.pages, sequence.num_generated) == ([], sequence.num_generated)
    assert served.scheduler.schedule().tiles[0].sequence is other


def test_a_sequence_waits_for_pages_in_flight_rather_than_end():
    served = service(num_pages=7, page_size=4, prefix_cache=False)
    (first,) = decoding(served, length=5)
    served.launch()
    (second,) = [served.submit(p, 12) for p in endless(8, 12)]
    served.launch()
    served.land(1)
    served.finish(first, "error")
    while not second.preemptions:
        if not served.launch().empty:
            served.land(1)
    served.drain()
    assert len(second.tokens) == 20


def test_a_cancelled_request_in_flight_ends_when_its_call_has_landed():
    served = service()
    (sequence,) = decoding(served)
    served.launch()
    served.scheduler.cancel(sequence.request.id)
    assert served.launch().finished == ()
    served.land()
    assert served.launch().finished == ((sequence, "cancelled"),)


def test_what_is_in_flight_is_in_no_other_plan():
    served = service(chunk_tokens=4)
    sequences = decoding(served, 2)
    first = served.launch()
    prompt = served.submit(text(12, 5))
    second, third = served.launch(), served.launch()
    assert set(first.decode) == set(sequences)
    assert [tile.sequence for tile in second.tiles] == [prompt] and not second.decode
    assert third.empty
    served.drain()


def test_a_call_that_failed_is_planned_again():
    served = service()
    (sequence,) = decoding(served)
    length = len(sequence.tokens)
    served.scheduler.discard(served.scheduler.schedule())
    assert served.step().decode == (sequence,)
    assert len(sequence.tokens) == length + 1


def test_a_row_without_an_output_is_planned_again():
    served = service()
    decoding_one, prompt = *decoding(served), served.submit(text(6, 3))
    plan = served.launch()
    served.flights.clear()
    served.scheduler.commit(plan, {})
    assert (prompt.computed, prompt.num_generated, prompt.prefilling) == (5, 0, True)
    # Its last position is computed again, on the same page: nothing else has seen it.
    plan = served.step()
    assert plan.decode == (decoding_one,)
    assert [(tile.start, tile.count, tile.last) for tile in plan.tiles] == [(5, 1, True)]
    served.drain()


def test_nothing_of_a_failed_sequence_stays_cached():
    served = service()
    (sequence,) = decoding(served, length=9)
    served.finish(sequence, "error")
    assert served.pool.num_cached == 0
    assert served.pool.lookup(sequence.tokens) == []


def test_deadlines_end_what_waits_and_what_runs():
    served = service(max_sequences=1)
    running = served.submit(endless(4, 30)[0], 30, deadline=served.now + 10)
    waiting = served.submit(text(4), deadline=served.now + 5)
    patient = served.submit(text(4), 1)
    assert served.step().finished == ()
    served.now += 5
    assert served.step().finished == ((waiting, "deadline"),)
    served.now += 5
    plan = served.step()
    assert plan.finished == ((running, "deadline"),)
    assert plan.tiles[0].sequence is patient
    served.drain()


def test_the_limit_is_that_of_the_request_or_of_the_context():
    served = service(max_context=16)
    prompt = endless(10, 30)[0]
    short, long = served.submit(prompt, 2), served.submit(prompt, 30)
    served.drain()
    assert (short.num_generated, len(long.tokens)) == (2, 16)
    assert short.finish_reason == long.finish_reason == "length"


def test_a_sequence_finishes_once():
    served = service()
    sequence = served.submit(text(4))
    served.finish(sequence, "stop")
    with pytest.raises(AssertionError, match="finished already"):
        served.finish(sequence, "stop")


# What is not taken


def test_a_full_queue_says_when_to_come_back():
    served = service(max_queue=3, max_sequences=1)
    served.now += 5000
    for seed in range(3):
        served.submit(text(2, seed), 1)
    with pytest.raises(QueueFull) as early:
        served.submit(text(2))
    # Nothing has left yet, and the time before the first request says nothing.
    assert early.value.retry_after == 1
    ends, begin = served.ends.total(), served.now
    for seed in range(200):
        served.step()
        served.now += 7
        while served.scheduler.num_waiting < 3:
            served.submit(text(2, seed), 1)
    with pytest.raises(QueueFull) as late:
        served.submit(text(2))
    seconds_each = (served.now - begin) / (served.ends.total() - ends)
    assert late.value.retry_after == pytest.approx(seconds_each, rel=0.3)
    assert 7 <= seconds_each <= 14


@pytest.mark.parametrize(
    ("length", "config", "match"),
    [
        (0, {}, "no token"),
        (64, {}, "64 tokens.*max_context=64"),
        (63, {"num_pages": 16}, "63 tokens; the cache holds 60.*num_pages=16"),
    ],
)
def test_what_can_never_be_served_is_refused(length, config, match):
    served = service(**config)
    with pytest.raises(ValueError, match=match):
        served.submit(text(length))
    assert served.scheduler.drained


def test_the_longest_prompt_is_served():
    served = service(num_pages=17, page_size=4)
    sequence = served.submit(text(63), 5)
    served.drain()
    assert len(sequence.tokens) == 64


def test_an_id_is_taken_until_its_request_ends():
    scheduler = Scheduler(SchedulerConfig(**CONFIG), PagePool(9, 4))
    request = Request("a", (1, 2), SamplingParams(1), lambda delta: None)
    sequence = scheduler.submit(request)
    with pytest.raises(ValueError, match="id='a'"):
        scheduler.submit(request)
    scheduler.finish(sequence, "cancelled")
    scheduler.submit(request)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_sequences": 0}, "max_sequences=0"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"tile_tokens": 0}, "tile_tokens=0"),
        ({"chunk_tokens": 100, "tile_tokens": 64}, "multiple of tile_tokens=64"),
        ({"max_context": 1}, "max_context=1"),
        ({"ageing_seconds": 0}, "ageing_seconds=0"),
        ({"ageing_seconds": float("nan")}, "ageing_seconds=nan"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        SchedulerConfig(**CONFIG | fields)
