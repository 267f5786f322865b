"""How rows are shared out to the blocks of threads of kernels for Hopper that take one row at a time."""

from __future__ import annotations

import dataclasses

LINE = 256
"""Columns in a line of shared memory: the most that one copy has of an axis."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """`piece`: columns of a row that a block takes at a time. `num_buffers` rows of each input are in its shared
    memory, and what is read of one stays in registers or is read twice."""

    num_programs: int
    num_buffers: int
    piece: int
    in_registers: bool
