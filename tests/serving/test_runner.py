"""Which programs a server compiles."""

import pytest

from serving.batch import Drawing
from serving.config import EngineConfig
from serving.runner import Cell, Draw, plan_cells, plan_draws

ENGINE = EngineConfig(batch_sizes=(1, 8), widths=(512, 2048), tile_counts=(1, 4), page_size=64, cell_tokens=8192)


def cells(*, drafts: int = 0, max_draft_batch: int = 0, decode: bool = False, prefill: bool = False) -> set[Cell]:
    planned = plan_cells(ENGINE, 4000, drafts, max_draft_batch, live_decode=decode, live_prefill=prefill)
    assert len(planned) == len(set(planned))
    return set(planned)


def test_every_context_has_programs_and_large_ones_are_run_as_several():
    assert {(c.rows, c.width) for c in cells() if c.drafts is None} == {
        *((1, width) for width in (512, 2048, 4032)),
        *((4, width) for width in (512, 2048)),
    }
    assert {(c.rows, c.width) for c in cells() if c.drafts == 0} == {
        *((1, width) for width in (512, 2048, 4032)),
        (8, 512),
    }


def test_one_width_serves_all_where_only_what_is_live_costs():
    planned = cells(decode=True, prefill=True)
    assert {(c.rows, c.width) for c in planned if c.drafts == 0} == {(1, 4032), (8, 4032)}
    # The fewest tiles fill the chip by cutting keys into parts, which a short context has no use for.
    assert {(c.rows, c.width) for c in planned if c.drafts is None} == {(1, 512), (1, 2048), (1, 4032), (4, 4032)}


@pytest.mark.parametrize("most", [0, 8])
def test_programs_with_drafts_are_for_batches_that_may_draft(most):
    drafting = {c.rows for c in cells(drafts=3, max_draft_batch=most, decode=True) if c.drafts == 3}
    assert drafting == ({1, 8} if most else {1})


def test_every_cell_has_its_draws():
    planned = plan_cells(ENGINE, 4000, 3, 1, live_decode=True, live_prefill=True)
    draws = plan_draws(planned, branches=False)
    for rows in (1, 8):
        assert {d.drawing for d in draws if d[:2] == (rows, 1)} == set(Drawing)
    assert {d.drawing for d in draws if d[:2] == (1, 4)} == set(Drawing)
    # Of prompts: whatever is wanted of the one token, the whole draw can do.
    assert [d.drawing for d in draws if d[:2] == (4, 1)] == [Drawing.GREEDY, Drawing.FULL]
    assert {(d.rows, d.length) for d in draws} == {(1, 1), (8, 1), (4, 1), (1, 4)}


def test_a_device_that_branches_has_two_draws_for_each_shape():
    draws = plan_draws((Cell(2, 512, 0), Cell(1, 512, None)), branches=True)
    assert draws == tuple(Draw(rows, 1, drawing) for rows in (1, 2) for drawing in (Drawing.GREEDY, Drawing.FULL))
