"""`matpac-fast bench`: the table, and a step taken apart."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from matpac_fast import backend, cli, spans
from matpac_fast.cli import _bench_profile
from matpac_fast.config import MatpacConfig
from matpac_fast.train.flops import part_flops, step_flops

TINY = MatpacConfig(
    n_frames=32, width=32, depth=1, num_heads=2, predictor_width=16, predictor_depth=1, predictor_heads=2
).replace(head_hidden=16, head_bottleneck=8, prototypes=16)


def test_every_part_of_a_step_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(_bench_profile, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(_bench_profile, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115 - as in a shell
    lines = _bench_profile.take_apart(TINY, 2, torch.device("cpu"), tmp_path / "profile")
    assert capfd.readouterr().err == ""  # torch's profiler would speak there
    assert [line[:20].strip() for line in lines[2:-2]] == list(spans.PARTS)
    shares = [float(line[30:38].rstrip().rstrip("%")) for line in lines[2:-2]]
    assert sum(shares) == pytest.approx(100, abs=1)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert set(spans.PARTS) <= {event.get("name") for event in events}
    memory = [e["args"]["MiB"] for e in events if (e.get("ph"), e["name"]) == ("C", "allocated on the CPU")]
    assert max(memory) > min(memory)
    with spans.span("student"):  # off again
        assert spans._open is None


def test_the_times_of_a_part_are_summed(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(spans.time, "perf_counter", lambda: next(clock))
    seconds: dict[str, float] = {}
    with spans.timed(seconds, torch.device("cpu")):
        for _ in range(2):
            with spans.span("student"):
                pass
    assert seconds == {"student": 3.0}


def test_parts_sum_to_the_step():
    assert sum(part_flops(MatpacConfig()).values()) == step_flops(MatpacConfig()) == pytest.approx(91.8e9, rel=0.005)
    assert set(part_flops(TINY)) | set(_bench_profile.least_bytes(TINY, 1, 1)) == set(spans.PARTS)


def test_the_command(capsys, monkeypatch):
    from matpac_fast.cli import bench

    monkeypatch.setattr(bench.MatpacConfig, "preset", classmethod(lambda cls, name: TINY))
    assert cli.main(["bench", "--preset", "tiny", "--batch-size", "2", "--seconds", "0.1", "--device", "cpu"]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    plain, fused, gain = (float(word.rstrip("x")) for word in rows["training step"][2:5])
    assert gain == pytest.approx(plain / fused, abs=0.02)  # of the times that stand beside it
    assert rows["log_mel, 2 x 6.08 s"][-1] == "cpp"
    assert float(rows["training step"][2]) > 0
    assert float(rows["embedding, 2 x 10 s"][-1].rstrip("x")) > 0


def test_each_row_is_of_the_preset_in_its_share_of_the_time_and_the_plain_formulas_come_first(monkeypatch, capsys):
    from matpac_fast.cli import bench

    asked = []

    def cases(*args):
        asked.append(args)
        return 2 * [("a row", "", lambda: None)]

    real = bench.compare
    monkeypatch.setattr(bench, "make_cases", cases)
    monkeypatch.setattr(bench, "compare", lambda call, seconds, device: asked.append(seconds) or (3.0, 2.0))
    assert cli.main(["bench", "--preset", "nano", "--batch-size", "3", "--seconds", "8", "--device", "cpu"]) == 0
    assert asked == [(MatpacConfig.preset("nano"), 3, "nano", torch.device("cpu")), 4.0, 4.0]
    assert capsys.readouterr().out.count("3.00      2.00   1.50x") == 2
    now = [0.0]  # a clock that only the calls move

    def call() -> None:
        now[0] += 3.0 if backend._forced == "reference" else 2.0

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert real(call, 0, torch.device("cpu")) == (3000.0, 2000.0)


@pytest.mark.parametrize("preset", ["nano", "large"])
def test_every_preset_is_one(preset, capsys):
    assert cli.main(["bench", "--preset", preset, "--seconds", "0"]) == cli.FAILED
    assert "--seconds is 0" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("file", "is a file"), ("file/below", "cannot be written")])
def test_a_profile_that_cannot_be_written_is_said_first(name, message, tmp_path, capsys, monkeypatch):
    from matpac_fast.cli import bench

    monkeypatch.setattr(bench, "make_cases", lambda *_: pytest.fail("measured before it was checked"))
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--profile", str(tmp_path / name), "--device", "cpu"]) == cli.FAILED
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batch-size", "0"], "--batch-size is 0"), (["--seconds", "-1"], "--seconds is -1"), (["--device", "x"], "x")],
)
def test_what_cannot_be(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == cli.FAILED
    assert message in capsys.readouterr().err
