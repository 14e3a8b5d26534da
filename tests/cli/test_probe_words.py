"""What `study` and `probe` say beside their numbers."""

from __future__ import annotations

import math

from matpac_fast.cli._probe import at_the_edge, bounds, differs, scored


def test_a_choice_at_the_edge_of_the_decays_is_told():
    rows = [dict(task="a", subset="", decays=[0.1, 0.1, 0.01]), dict(task="a", subset="b", decays=[0.01] * 9)]
    rows.append(dict(task="c", subset="", decays=[1e-4] * 2))
    assert at_the_edge(rows, (1e-4, 0.01, 0.1)) == [
        "a: 2 of 3 probes took the largest of the decays, 0.1; --decays with larger ones may score better.",
        "c: 2 of 2 probes took the smallest of the decays, 0.0001; --decays with smaller ones may score better.",
    ]
    assert at_the_edge(rows, (0.1,)) == []
    assert at_the_edge(rows[-1:], (0.0, 1e-4)) == [
        "c: 2 of 2 probes took the largest of the decays, 0.0001; --decays with larger ones may score better."
    ]


def test_of_one_group_no_interval_is_told():
    assert bounds(0.25, 0.5) == "0.250–0.500"
    assert bounds(math.nan, math.nan) == "no interval: one group"


def test_without_a_clip_of_any_class_it_is_the_score_that_is_missing():
    assert scored(0.5, 0.25, 0.75) == "0.500 (0.250–0.750)"
    assert scored(0.5, math.nan, math.nan) == "0.500 (no interval: one group)"
    assert scored(math.nan, math.nan, math.nan) == "no score: no clip of any class"


def test_a_difference_of_no_clip_is_told_in_words():
    assert differs(0.0, 0.0, 0.0) == differs(1e-17, -1e-17, 1e-17) == "+0.000 (no clip differs)"
    assert differs(0.0, math.nan, math.nan) == "+0.000 (no interval: one group)"
    assert differs(0.0, -0.1, 0.1) == "+0.000 (-0.100 to +0.100)"
