"""Seconds of collectives, against bytes over links and hops counted by hand."""

import pytest

from perf.chips import CHIPS
from perf.interconnect import HOP_SECONDS, SLICE_SECONDS, SWITCH_SECONDS, Place, axes_of, switch, torus
from tests.perf.hlo_programs import CHIP, box, snake

GB = 10**9
V5E, V5P = 45 * GB, 90 * GB
MB = 10**6
HOP = HOP_SECONDS


def test_shapes_of_slices():
    """Only a whole side of a v5e pod is a ring; v5p's blocks of 4 × 4 × 4 always are."""
    assert box("TPU v5e", 4, 4).wraps == (False, False) and box("TPU v5e", 8, 16).wraps == (False, True)
    assert box("TPU v6e", 16, 16).wraps == (True, True)
    assert box("TPU v5p", 4, 4, 8).wraps == (True, True, True) and box("TPU v5p", 2, 2, 4).wraps == (False,) * 3
    rates = {name: box(name, *(4,) * axes).link for name, axes in (("TPU v4", 3), ("TPU v5e", 2), ("TPU v5p", 3))}
    assert rates == pytest.approx({"TPU v4": 45 * GB, "TPU v5e": 45 * GB, "TPU v5p": 90 * GB})
    assert box("TPU v6e", 4, 4).link == pytest.approx(90 * GB)


def test_a_line_of_four():
    network = box("TPU v5e", 4, 4)
    # The end of a line has one link; 3 hops from end to end.
    assert network.seconds("all-gather", 4 * MB, [0, 1, 2, 3]) == pytest.approx(3 * MB / V5E + 3 * HOP)
    assert network.seconds("reduce-scatter", 4 * MB, [0, 1, 2, 3]) == pytest.approx(3 * MB / V5E + 3 * HOP)
    assert network.seconds("all-reduce", 4 * MB, [0, 1, 2, 3]) == pytest.approx(6 * MB / V5E + 6 * HOP)
    # The link in the middle carries 2 × 2 of the 4 parts of a device's array.
    assert network.seconds("all-to-all", 4 * MB, [0, 1, 2, 3]) == pytest.approx(4 * MB / V5E + 3 * HOP)


def test_a_ring_of_sixteen():
    network = box("TPU v5e", 16, 16)
    row, column = list(range(16)), list(range(0, 256, 16))
    seconds = 15 * MB / (2 * V5E) + 8 * HOP
    assert network.seconds("all-gather", 16 * MB, row) == pytest.approx(seconds)
    assert network.seconds("all-gather", 16 * MB, column) == pytest.approx(seconds)
    assert network.seconds("all-to-all", 16 * MB, row) == pytest.approx(2 * 16 * MB / V5E + 8 * HOP)


def test_two_axes_work_at_once():
    network = box("TPU v5e", 16, 16)
    whole = list(range(256))
    assert network.seconds("all-gather", 256 * MB, whole) == pytest.approx(255 * MB / (4 * V5E) + 16 * HOP)
    one_ring = network.seconds("all-gather", 256 * MB, whole, one_ring=True)
    assert one_ring == pytest.approx(255 * MB / (2 * V5E) + 128 * HOP)
    # On one axis there is nothing to choose.
    assert network.seconds("all-gather", MB, [0, 1], one_ring=True) == network.seconds("all-gather", MB, [0, 1])


def test_every_second_chip_shares_its_links():
    network = box("TPU v5e", 16, 16)
    assert network.seconds("all-gather", 8 * MB, list(range(0, 16, 2))) == pytest.approx(7 * MB / V5E + 8 * HOP)


def test_half_of_a_ring_is_a_line():
    network = box("TPU v5e", 16, 16)
    assert network.seconds("all-gather", 8 * MB, list(range(8))) == pytest.approx(7 * MB / V5E + 7 * HOP)


def test_three_axes():
    network = box("TPU v5p", 4, 4, 4)
    assert network.seconds("all-reduce", 64 * MB, range(64)) == pytest.approx(2 * 63 * MB / (6 * V5P) + 2 * 6 * HOP)
    assert network.seconds("all-gather", 4 * MB, [0, 16, 32, 48]) == pytest.approx(3 * MB / (2 * V5P) + 2 * HOP)


def test_permutes():
    network, ring = snake(), box("TPU v5e", 16, 16)
    around = [(i, (i + 1) % 16) for i in range(16)]
    # make_mesh lays a ring through the slice: one hop each, to both sides.
    assert network.permute_seconds(MB, around) == pytest.approx(MB / V5E + HOP)
    assert network.permute_seconds(MB, [(b, a) for a, b in around]) == pytest.approx(MB / V5E + HOP)
    assert ring.permute_seconds(MB, around) == pytest.approx(MB / V5E + HOP), "the long way around is one hop on a ring"
    assert ring.permute_seconds(MB, [(i, (i + 3) % 16) for i in range(16)]) == pytest.approx(3 * (MB / V5E + HOP))
    assert ring.permute_seconds(MB, [(0, 0)]) == 0.0
    assert ring.lanes([0, 1], is_permute=True) == ("axis 0 +",) and ring.lanes([0, 15], is_permute=True) == (
        "axis 0 -",
    )
    assert ring.lanes([0, 16]) == ("axis 1 +", "axis 1 -")


def test_between_slices():
    network = box("TPU v5e", 2, 2, slices=2)
    rate = 3.125 * GB
    # Each device exchanges its own part with the one at its place.
    assert network.between("all-reduce", MB, 2) == pytest.approx(MB / rate + SLICE_SECONDS)
    both = network.seconds("all-gather", 8 * MB, range(8))
    within = 3 / 4 * 8 * MB / (2 * V5E) + 2 * HOP
    assert both == pytest.approx(within + MB / rate + SLICE_SECONDS)
    assert network.lanes([0, 4]) == ("between slices",)
    unknown = switch(CHIP["H100 PCIe"], 2)
    with pytest.raises(ValueError, match="the rate between slices is not known"):
        unknown.between("all-reduce", MB, 2)


def test_a_switch():
    network = switch(CHIP["H100 SXM"], 8)
    rate = 450 * GB
    assert network.seconds("all-gather", 8 * MB, range(8)) == pytest.approx(7 * MB / rate + SWITCH_SECONDS)
    assert network.seconds("all-reduce", 8 * MB, [1, 5]) == pytest.approx(8 * MB / rate + SWITCH_SECONDS)
    assert network.permute_seconds(MB, [(0, 1), (1, 0)]) == pytest.approx(MB / rate + SWITCH_SECONDS)
    assert network.lanes([0, 3]) == ("switch",)


def test_nothing_to_do_takes_no_time():
    network = box("TPU v5e", 4, 4)
    assert network.seconds("all-reduce", MB, [3]) == network.seconds("all-reduce", 0, [0, 1]) == 0.0
    assert box("TPU7x", 2, 2, 1).seconds("all-reduce", MB, [0]) == 0.0


def test_what_is_not_known_is_refused():
    network = box("TPU v5e", 4, 4)
    with pytest.raises(ValueError, match="unknown kind of collective 'gossip'"):
        network.seconds("gossip", MB, [0, 1])
    with pytest.raises(ValueError, match="H100 SXM has no ICI torus"):
        torus(CHIP["H100 SXM"], [Place(0, (0, 0))])
    with pytest.raises(ValueError, match="no rate between L4s is known"):
        switch(CHIP["L4"], 2)


def test_more_bytes_and_more_devices_never_take_less():
    for chip in CHIPS:
        if not chip.name.startswith("TPU"):
            continue
        network = box(chip.name, *((16, 16) if len(box(chip.name, 2, 2, 2).dims) == 2 else (4, 4, 16)))
        groups = [range(2**k) for k in range(1, 9)]
        for kind in ("all-gather", "all-reduce", "all-to-all"):
            for group in groups:
                assert network.seconds(kind, 2 * MB, group) > network.seconds(kind, MB, group) > 0


def test_mesh_axes_of_a_group():
    mesh = {"slice": 1, "data": 2, "fsdp": 4, "tensor": 2}
    assert axes_of([0, 1], mesh) == ("tensor",) and axes_of([0, 2, 4, 6], mesh) == ("fsdp",)
    assert axes_of([0, 8], mesh) == ("data",) and axes_of(range(16), mesh) == ("data", "fsdp", "tensor")
    assert axes_of([5], mesh) == ()
