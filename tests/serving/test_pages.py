import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pages import TRASH, PagePool


def filled(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages of a sequence that has just been computed: what was known, and the rest."""
    pages = pool.match(tokens)
    rest = pool.allocate(pool.pages_for(len(tokens)) - len(pages))
    assert rest is not None
    pool.commit(tokens, pages + rest, len(tokens))
    return pages + rest


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.num_free, pool.num_cached, pool.num_live


def test_every_page_but_the_trash_page_is_given_out():
    pool = PagePool(5, 4)
    pages = pool.allocate(4)
    assert sorted(pages) == [1, 2, 3, 4]
    assert TRASH not in pages
    assert counts(pool) == (0, 0, 4)
    pool.release(pages)
    assert counts(pool) == (4, 0, 0)


def test_allocation_is_all_or_nothing():
    pool = PagePool(5, 4)
    pool.allocate(2)
    assert pool.allocate(3) is None
    assert counts(pool) == (2, 0, 2)
    assert pool.allocate(0) == []


@pytest.mark.parametrize(("arguments", "match"), [((1, 4), "num_pages=1"), ((4, 0), "page_size=0")])
def test_a_pool_without_room_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        PagePool(*arguments)


def test_a_prefix_is_found_up_to_the_last_full_page():
    pool = PagePool(9, 4)
    pages = filled(pool, list(range(10)))
    assert counts(pool) == (5, 0, 3)
    assert pool.match([*range(8), 99, 98]) == pages[:2]
    assert pool.match([*range(7), 99, 98]) == pages[:1]
    assert pool.match([99, *range(1, 10)]) == []
    # The third page is not full.
    assert pool.match(list(range(14))) == pages[:2]


def test_the_last_token_stays_to_be_computed():
    pool = PagePool(9, 4)
    pages = filled(pool, list(range(8)))
    assert pool.match(list(range(8))) == pages[:1]
    assert pool.match(list(range(9))) == pages


def test_a_page_is_known_by_all_that_is_before_it():
    pool = PagePool(9, 2)
    filled(pool, [1, 2, 7, 7, 5])
    assert pool.match([3, 4, 7, 7, 5]) == []


def test_a_hash_tells_tokens_from_each_other_that_python_does_not():
    assert hash((-1, 5)) == hash((-2, 5))
    pool = PagePool(9, 2)
    filled(pool, [-1, 5, 0])
    assert pool.match([-2, 5, 0]) == []


def test_released_pages_are_cached_and_found_again():
    pool = PagePool(9, 4)
    pages = filled(pool, list(range(10)))
    pool.release(pages)
    assert counts(pool) == (6, 2, 0)
    assert pool.lookup(list(range(10))) == pages[:2]
    assert pool.num_available_beside(pages[:2]) == 6
    assert counts(pool) == (6, 2, 0)
    assert pool.match(list(range(10))) == pages[:2]
    assert counts(pool) == (6, 0, 2)
    assert pool.num_available_beside(pages[:2]) == 6


def test_without_a_prefix_cache_nothing_is_kept():
    pool = PagePool(9, 4, prefix_cache=False)
    pages = filled(pool, list(range(10)))
    assert pool.match(list(range(10))) == []
    pool.release(pages)
    assert counts(pool) == (8, 0, 0)


def test_a_shared_page_lives_until_the_last_lets_go():
    pool = PagePool(9, 4)
    first, second = filled(pool, list(range(10))), filled(pool, list(range(10)))
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    pool.release(first)
    assert counts(pool) == (5, 0, 3)
    pool.release(second)
    assert counts(pool) == (6, 2, 0)


def test_eviction_takes_the_least_recently_used_and_leaves_first():
    pool = PagePool(7, 1)
    old, new = filled(pool, [1, 2, 3]), filled(pool, [4, 5, 6])
    pool.release(old)
    pool.release(new)
    assert counts(pool) == (0, 6, 0)
    evicted = [pool.allocate(1)[0] for _ in range(4)]
    assert evicted == [*reversed(old), new[2]]
    assert pool.lookup([4, 5, 6, 0]) == new[:2]


def test_use_saves_a_page_from_eviction():
    pool = PagePool(7, 1)
    old, new = filled(pool, [1, 2, 3]), filled(pool, [4, 5, 6])
    pool.release(old)
    pool.release(new)
    pool.release(pool.match([1, 2, 0]))
    assert [pool.allocate(1)[0] for _ in range(6)] == [old[2], *reversed(new), old[1], old[0]]


def test_pages_in_use_are_not_evicted():
    pool = PagePool(5, 1)
    pages = filled(pool, [1, 2, 3])
    pool.release(pages)
    held = pool.match([1, 2, 0])
    assert pool.allocate(3) is None
    assert not set(pool.allocate(2)) & set(held)


def test_content_computed_twice_is_kept_once():
    pool = PagePool(9, 2)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.commit([1, 2, 3, 4], first, 4)
    pool.commit([1, 2, 3, 4], second, 4)
    assert pool.match([1, 2, 3, 4, 0]) == first
    pool.release(first)
    pool.release(second)
    assert counts(pool) == (6, 0, 2)
    pool.release(first)
    assert counts(pool) == (6, 2, 0)


def test_children_of_a_duplicate_are_found_and_outlived_by_their_parent():
    pool = PagePool(5, 1)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.commit([1], first, 1)
    pool.commit([1, 2], second, 2)
    pool.release(first)
    assert pool.lookup([1, 2, 0]) == [first[0], second[1]]
    pool.release(second)
    assert counts(pool) == (2, 2, 0)
    assert [pool.allocate(1)[0] for _ in range(4)][2:] == [second[1], first[0]]


def test_a_duplicate_takes_the_place_of_a_page_that_was_evicted():
    pool = PagePool(4, 1)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.commit([1], first, 1)
    pool.commit([1, 2], second, 2)
    pool.release(first)
    pool.allocate(1)
    assert pool.lookup([1, 2, 0]) == []
    pool.release(second)
    assert pool.lookup([1, 2, 0]) == second
    assert counts(pool) == (0, 2, 1)


def test_commit_can_be_repeated_and_continued():
    pool = PagePool(9, 2)
    pages = pool.allocate(3)
    tokens = [1, 2, 3, 4, 5, 6]
    for computed in (1, 2, 2, 3, 6, 6):
        pool.commit(tokens, pages, computed)
        assert pool.lookup([*tokens, 0]) == pages[: computed // 2]


def test_pages_of_doubtful_content_are_forgotten():
    pool = PagePool(9, 2)
    pages = filled(pool, [1, 2, 3, 4])
    also = pool.match([1, 2, 0])
    pool.release(pages, forget=True)
    assert pool.lookup([1, 2, 3, 4, 0]) == []
    assert counts(pool) == (7, 0, 1)
    pool.release(also)
    assert counts(pool) == (8, 0, 0)


def test_a_page_released_too_often_is_noticed():
    pool = PagePool(5, 4)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="no reference"):
        pool.release(pages)


def test_hashes_are_reused_by_a_second_lookup(monkeypatch):
    pool = PagePool(9, 2)
    pages = filled(pool, [1, 2, 3, 4, 5])
    keys = []
    assert pool.lookup([1, 2, 3, 4, 5], keys) == pages[:2]
    assert len(keys) == 2
    monkeypatch.setattr(pool, "_key", None)
    assert pool.match([1, 2, 3, 4, 5], keys) == pages[:2]


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), num_pages=st.integers(2, 14), page_size=st.integers(1, 3), cache=st.booleans())
def test_pages_hold_what_they_are_known_for(seed, num_pages, page_size, cache):
    """Random sequences over few tokens: every page that is given out for a text has just that text written on it."""
    draw = random.Random(seed)
    pool = PagePool(num_pages, page_size, prefix_cache=cache)
    written: dict[int, tuple[int, ...]] = {}
    running: list[tuple[list[int], list[int]]] = []
    for _ in range(60):
        if running and draw.random() < 0.45:
            pool.release(running.pop(draw.randrange(len(running)))[1], forget=draw.random() < 0.1)
        else:
            tokens = [draw.randrange(2) for _ in range(draw.randint(1, 4 * page_size))]
            known = pool.match(tokens)
            assert len(known) * page_size < len(tokens)
            for index, page in enumerate(known):
                assert written[page] == tuple(tokens[: (index + 1) * page_size])
            rest = pool.allocate(pool.pages_for(len(tokens)) - len(known))
            if rest is None:
                assert pool.pages_for(len(tokens)) - len(known) > pool.num_available
                pool.release(known)
            else:
                pages = known + rest
                for index in range(len(known), len(pages)):
                    written[pages[index]] = tuple(tokens[: (index + 1) * page_size])
                pool.commit(tokens, pages, draw.randint(len(known) * page_size, len(tokens)))
                running.append((tokens, pages))
        pool.check()
        held = [page for _, pages in running for page in pages]
        assert pool.num_live == len(set(held))
        assert TRASH not in held
    for _, pages in running:
        pool.release(pages)
    pool.check()
    assert pool.num_live == 0
