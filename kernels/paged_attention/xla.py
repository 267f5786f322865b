"""Attention over pages by XLA: the pages of each row are copied end to end, then read by its attention.

The copy is what a kernel saves: keys and values are read and written once more than needed, over the whole width of
the page table.
"""

from __future__ import annotations

import functools

from kernels.attention import xla
from kernels.paged_attention.gather import attend_gathered

paged_attention = functools.partial(attend_gathered, xla.attention)
