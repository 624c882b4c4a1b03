"""How a profile's time is shared out among operations that run at once."""

import pytest

from benchmarks.speed.where_time_goes import Interval, kind_of, shared_time


def test_every_moment_is_shared_by_what_runs_in_it():
    """a runs alone for 5, beside b for 5, and for 10 after a gap of 5; b for 5 more, 1 of them beside two c."""
    found = [
        Interval(0, 10, "a"),
        Interval(5, 15, "b"),
        Interval(20, 30, "a"),
        Interval(12, 13, "c"),
        Interval(12, 13, "c"),
    ]
    times, idle = shared_time(found)
    assert times == pytest.approx({"a": 5 + 2.5 + 10, "b": 2.5 + 4 + 1 / 3, "c": 2 / 3})
    assert idle == 5
    assert sum(times.values()) + idle == pytest.approx(30)


def test_kinds_of_operations():
    names = ("ynn_fusion.3", "transpose_copy_fusion", "reduce_fusion", "add_bitcast_fusion", "dot.85")
    expected = ["matrix", "copies", "reductions", "elementwise", "matrix"]
    assert [kind_of(name).split()[0].rstrip(",") for name in names] == expected
