"""`matpac-fast study --hop`: the table, the plots and the report all cost a second of audio by it."""

from __future__ import annotations

import dataclasses

import pytest

from matpac_fast import cli
from matpac_fast.cli import study
from matpac_fast.study import sweep
from tests.study.conftest import made_cost

ONE = ["--hop", "0.25", "--aggregate", "one"]  # of one window a clip there is no next one


@pytest.mark.parametrize(
    ("options", "step", "real_time"), [([], None, "500"), (["--hop", "0.25"], 0.25, "250"), (ONE, None, "500")]
)
def test_a_second_of_audio_is_costed_by_the_hop_everywhere(tmp_path, capsys, monkeypatch, options, step, real_time):
    # 4 windows of 0.5 s take 4 ms
    monkeypatch.setattr(sweep, "measure", lambda name, ts, *_: dataclasses.replace(made_cost(ts), batch_ms=4.0))
    asked = []
    monkeypatch.setattr(study, "write_plots", lambda out, results, costs, hop: asked.append(hop) or ([], []))
    arguments = [
        "study",
        "--encoders",
        "logmel-stats",
        "--cost-only",
        "--temporal-support",
        "0.5",
        "--batch-sizes",
        "4",
    ]
    assert cli.main([*arguments, *options, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert asked == [step]
    assert capsys.readouterr().out.splitlines()[1].split()[-2] == real_time
    assert f'data-value="{1e3 / float(real_time)}"' in (tmp_path / "report.html").read_text()
