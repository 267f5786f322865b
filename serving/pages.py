"""Pages of the KV cache: which are free, which are shared, and which hold a prefix that may be asked for again.

A page holds the keys and values of `page_size` consecutive tokens of every layer. It is in one of three states:

  live    one or more sequences refer to it;
  cached  none does, but its content is known by a hash and it is given back whole to a prompt that begins the same;
  free    none does, and its content means nothing.

A page is known by the hash of its parent's hash and its own tokens, so a hash stands for everything from the start
of the text. The hash is blake2b with 256 bits: a wrong hit would show one user's text to another, `hash()` of a tuple
of ints is easily made to collide by who chooses the prompt, and comparing tokens instead would mean to keep them for
every page and to compare the parents too.

Eviction takes the least recently used cached page, and a page before its parent, since a page whose parent is gone
cannot be found. That order needs no tree: a sequence lets go of its pages last first, and holds a page of the same
content for every parent of a page that it holds, so a parent is always used later than its children.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

TRASH = 0
"""The page that padded rows and positions past a sequence's pages write to. Never handed out."""

_ROOT = b""
_KEY_BYTES = 32


class PagePool:
    """Counts references to pages 1 to num_pages - 1. `prefix_cache=False` never gives a page to a second sequence.

    Raises ValueError without room for one page besides the trash page.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page {TRASH} holds no sequence")
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, TRASH, -1))
        # Cached pages, the least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Live and cached pages of known content. Two live pages may have one key: both were computed.
        self._key_of: dict[int, bytes] = {}
        # The one page that is given out for a key: the first that had it.
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_live(self) -> int:
        return self.capacity - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def capacity(self) -> int:
        """Pages that sequences can have at all."""
        return self.num_pages - 1

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def lookup(self, tokens: Sequence[int], keys: list[bytes] | None = None) -> list[int]:
        """Pages whose content is the beginning of `tokens`, as far as known, without taking a reference.

        At least the last token is left out: its logits are wanted, and they are in no page. `keys` are the hashes of
        the first pages of `tokens` from an earlier call; it is extended in place, so that asking again costs no hash.
        """
        if not self.prefix_cache:
            return []
        keys = [] if keys is None else keys
        pages = []
        for index in range((len(tokens) - 1) // self.page_size):
            if index == len(keys):
                keys.append(self._key(keys[-1] if keys else _ROOT, tokens, index))
            page = self._page_of.get(keys[index])
            if page is None:
                break
            pages.append(page)
        return pages

    def match(self, tokens: Sequence[int], keys: list[bytes] | None = None) -> list[int]:
        """`lookup`, with a reference taken on each page."""
        pages = self.lookup(tokens, keys)
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1
        return pages

    def num_available_beside(self, pages: Sequence[int]) -> int:
        """Pages that `allocate` could give once these, from `lookup`, are referred to."""
        references = self._references
        return self.num_available - sum(not references[page] for page in pages)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, evicting cached ones if needed; None, and no change, if too few."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def release(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """Drops one reference on each of a sequence's pages, given in the order of its tokens.

        `forget` is for content that may be wrong: the pages are given to no one again, and whoever else has them keeps
        them.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} has no reference to drop"
            if forget:
                self._forget(page)
            self._references[page] -= 1
            if not self._references[page]:
                self._retire(page)

    def forget_all(self) -> None:
        """The content of every page is lost: nothing is found any more, and cached pages are free."""
        while self._cached:
            self._evict()
        self._key_of.clear()
        self._page_of.clear()

    def commit(self, tokens: Sequence[int], pages: Sequence[int], computed: int) -> None:
        """Makes the full pages of tokens[:computed] known by their content. They must not be written again.

        Costs nothing for pages that are known already. Where another page of the same content is known, that one goes
        on being given out, and this one is freed when its sequence lets go of it.
        """
        if not self.prefix_cache:
            return
        full = first = computed // self.page_size
        while first and pages[first - 1] not in self._key_of:
            first -= 1
        key = self._key_of[pages[first - 1]] if first else _ROOT
        for index in range(first, full):
            key = self._key(key, tokens, index)
            self._key_of[pages[index]] = key
            self._page_of.setdefault(key, pages[index])

    def check(self) -> None:
        """Asserts what must hold between any two calls. Takes time in proportion to the pages."""
        live = {page for page, count in enumerate(self._references) if count}
        free, cached = set(self._free), set(self._cached)
        assert all(count >= 0 for count in self._references)
        assert len(free) == len(self._free), "a page is free twice"
        assert not (live & free or live & cached or free & cached), "a page is in two states"
        assert live | free | cached == set(range(1, self.num_pages)), "a page is lost, or the trash page is in use"
        assert self.num_free + self.num_cached + self.num_live == self.capacity and self.num_live == len(live)
        assert cached <= set(self._page_of.values()), "a cached page cannot be found"
        assert not free & set(self._key_of), "a free page has a content"
        assert all(self._key_of[page] == key for key, page in self._page_of.items())

    def _key(self, parent: bytes, tokens: Sequence[int], index: int) -> bytes:
        page = array("q", tokens[index * self.page_size : (index + 1) * self.page_size])
        return hashlib.blake2b(parent + page.tobytes(), digest_size=_KEY_BYTES).digest()

    def _retire(self, page: int) -> None:
        """A page that lost its last reference: cached if it is the one of its content, else free."""
        key = self._key_of.get(page)
        if key is None:
            self._free.append(page)
            return
        # The known page of this content may have been evicted since: then this one takes its place.
        known = self._page_of.setdefault(key, page)
        if known == page:
            self._cached[page] = None
            return
        del self._key_of[page]
        self._free.append(page)
        if known in self._cached:
            # Its children may hang on this key: it was used as late as they were.
            self._cached.move_to_end(known)

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None and self._page_of.get(key) == page:
            del self._page_of[key]

    def _evict(self) -> None:
        page, _ = self._cached.popitem(last=False)
        self._forget(page)
        self._free.append(page)
