"""What the measurements around the queue come to."""

from __future__ import annotations

import pytest

from rlhf_dist.bench.queue_figures import Memory, Reading, Window, growth, speeds


def test_reading_is_fetching_and_building_against_a_copy_of_the_same_bytes():
    readings = [Reading(100, 1.0, 3.0, 2.0), Reading(100, 2.0, 8.0, 1.0), Reading(100, 0.5, 1.5, 4.0)]
    found = speeds(readings)
    assert found.read == 25.0, "of 25, 10 and 50"
    assert found.memcpy == 50.0
    assert found.ratio == 0.5


def test_rates_of_a_window():
    window = Window(seconds=4.0, num_samples=200, num_bytes=1000, num_puts=5, put_s=0.5, memory=())
    assert (window.samples_per_s, window.bytes_per_s, window.mean_put_s) == (50.0, 250.0, 0.1)
    assert Window(1.0, 0, 0, 0, 0.0, ()).mean_put_s == 0.0


def test_growth_is_the_highest_after_the_warm_up_less_what_there_was_then():
    memory = [Memory(0, 100, 900), Memory(10, 150, 300), Memory(20, 170, 280), Memory(30, 160, 290)]
    assert growth(memory, warm_up_s=10) == (20, 0)
    assert growth(memory, warm_up_s=30) == (0, 0)
    with pytest.raises(ValueError, match="no measurement 31 s after the beginning"):
        growth(memory, warm_up_s=31)
