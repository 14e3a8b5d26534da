"""What is told of a long command: done, rate and time left."""

from __future__ import annotations

import pytest
from rich.console import Console

from matpac_fast.cli import _progress
from matpac_fast.cli._progress import told_rate
from matpac_fast.cli._table import show


@pytest.mark.parametrize(
    ("rate", "told"),
    [(0, ""), (28.4, "28/s"), (3.46, "3.5/s"), (1 / 12, "12.0 s each"), (1 / 240, "4.0 min each"), (-1, "")],
)
def test_a_rate_is_told_in_a_unit_in_which_it_is_no_fraction(rate, told):
    assert told_rate(rate) == told


def test_lines_tell_the_rate_since_the_first_call(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    lines = _progress._Lines(Console(width=200), "embedding", "s of audio")
    for second, done in ((40, 1000), (41, 1028), (50, 1280), (51, 1300), (60, 1560)):  # 1000 of an earlier run
        now[0] = second
        lines(done, 2000, "1/9 files")
    assert capsys.readouterr().out.splitlines() == [
        "embedding 1000/2000 s of audio; 1/9 files",
        "embedding 1280/2000 s of audio, 28/s, 0:00:26 left; 1/9 files",
        "embedding 1560/2000 s of audio, 28/s, 0:00:16 left; 1/9 files",
    ]


def test_of_long_pieces_parts_are_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    lines = _progress._Lines(Console(width=200), "probing", "probes")
    for second, done in ((0, 0), (10, 0.5), (20, 1.0)):
        now[0] = second
        lines(done, 4)
    assert capsys.readouterr().out.splitlines() == [
        "probing 0.5/4 probes, 20.0 s each, 0:01:10 left",
        "probing 1/4 probes, 20.0 s each, 0:01:00 left",
    ]


@pytest.mark.parametrize("drawn", [True, False])
def test_a_table_shows_names_as_they_are(capsys, monkeypatch, drawn):
    monkeypatch.setattr("sys.stdout.isatty", lambda: drawn)
    show(["encoder"], [["a[bold]"], ["a[b]:bomb:"], ["a\x1b[2J"]])
    said = capsys.readouterr().out
    for name in ("a[bold]", "a[b]:bomb:", "a\\x1b[2J"):
        assert name in said
