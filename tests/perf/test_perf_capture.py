"""Traces of a window, and what says that they are."""

import gzip
import json

import jax.numpy as jnp
import pytest

from perf.capture import NOTE_FILE, Capture, parse_window


def test_a_trace_can_be_read_and_says_what_it_is(tmp_path):
    capture = Capture(tmp_path / "one")
    capture.start()
    jnp.ones((8, 8)).sum().block_until_ready()
    assert capture.active
    capture.stop(kind="train", first_step=3)
    note = json.loads((tmp_path / "one" / NOTE_FILE).read_text())
    assert (note["kind"], note["first_step"], note["absolute_numbers_count"]) == ("train", 3, False)
    assert note["seconds"] > 0 and note["device"] and note["jax"]
    capture.save_program("step", "HloModule jit_step")
    assert gzip.decompress((tmp_path / "one" / "step.hlo.gz").read_bytes()) == b"HloModule jit_step"
    # For xprof and for Perfetto.
    assert list((tmp_path / "one").rglob("*.xplane.pb")) and list((tmp_path / "one").rglob("perfetto_trace.json.gz"))
    # Another one of the same name leaves it alone.
    assert Capture(tmp_path / "one").folder == tmp_path / "one.1"


@pytest.mark.parametrize("text", ["", "10", "10:", ":3", "4:3", "0:3", "a:b", "1:2:3", "-1:3", "1.0:3"])
def test_what_is_no_window(text):
    with pytest.raises(ValueError, match="must be FIRST:LAST"):
        parse_window(text)


def test_a_window_counts_both_ends():
    assert list(parse_window("10:13")) == [10, 11, 12, 13]
