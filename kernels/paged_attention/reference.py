"""Attention over pages as its definition: the pages of each row laid end to end, and the plain attention over them."""

from __future__ import annotations

import functools

from kernels.attention import reference
from kernels.paged_attention.gather import attend_gathered

paged_attention = functools.partial(attend_gathered, reference.attention)
