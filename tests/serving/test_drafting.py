"""Prompt lookup against a plain search."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.drafting import ngram_drafts

WIDTH = 12


@functools.cache
def compiled(k: int, max_ngram: int, min_ngram: int):
    return jax.jit(functools.partial(ngram_drafts, k=k, max_ngram=max_ngram, min_ngram=min_ngram))


def propose(texts, k=3, max_ngram=3, min_ngram=1, junk=1):
    """Drafts of texts, as lists; the rest of each row is junk that matches a lot."""
    tokens = np.full((len(texts), WIDTH), junk, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    drafts, count = compiled(k, max_ngram, min_ngram)(tokens, np.array([len(text) for text in texts], np.int32))
    assert drafts.shape == (len(texts), k) and drafts.dtype == count.dtype == np.int32
    return [list(map(int, row[:n])) for row, n in zip(np.asarray(drafts), np.asarray(count), strict=True)]


def search(text, k, max_ngram, min_ngram):
    for n in range(max_ngram, min_ngram - 1, -1):
        for begin in range(len(text) - n - 1, -1, -1):
            if len(text) > n and text[begin : begin + n] == text[-n:]:
                grown = list(text)
                for i in range(k):
                    grown.append(grown[begin + n + i])
                return grown[len(text) :]
    return []


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=WIDTH), min_size=4, max_size=4),
    st.sampled_from([(3, 3, 1), (5, 2, 2), (1, 4, 1)]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_drafts_are_those_of_a_search(texts, setting):
    assert propose(texts, *setting) == [search(text, *setting) for text in texts]


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([], []),
        ([7], []),
        ([7, 8, 9], []),
        ([7, 7], [7, 7, 7]),
        ([4, 5, 6, 4, 5], [6, 4, 5]),
        ([1, 2, 9, 3, 2, 8, 1, 2], [9, 3, 2]),  # the longer suffix before the more recent one
        ([2, 9, 3, 2, 8, 7, 2], [8, 7, 2]),  # the most recent of equal length
        ([3, 4, 3, 4, 3, 4], [3, 4, 3]),  # a period goes on beyond the end
        ([*range(10), 0, 1], [2, 3, 4]),  # the row is full
    ],
)
def test_examples(text, drafts):
    assert propose([text]) == [drafts]


def test_junk_beyond_the_length_is_not_read():
    assert propose([[5, 6, 1]], junk=1) == propose([[5, 6, 1]], junk=6) == [[]]


def test_no_drafts_asked_for():
    assert propose([[1, 1, 1]], k=0) == [[]]
