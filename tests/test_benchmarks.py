"""What the benchmarks count, and which results the README's tables accept."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import floors
import pytest
import report
from _timing import Case, summary


def test_bytes_and_flops_against_counts_by_hand():
    wave, mels = 256 * 160_000 * 4, 256 * 80 * 998 * 4
    assert floors.log_mel(256, 160_000, 80, 998) == (wave + mels, 0)
    assert floors.log_mel(256, 160_000, 80, 998, in_bytes=2, out_bytes=2) == ((wave + mels) // 2, 0)
    assert floors.log_mel(256, 160_000, 80, 998).seconds(3.0e12, 1.0) == pytest.approx(82e-6, rel=0.01)
    assert floors.mask_shuffle(2, 3) == (2 * 8 + 6 * 8, 0)

    embed = floors.masked_patch_embed(256, 80, 608, 768, 57)
    assert embed.flops == pytest.approx(19.1e9, rel=0.01)
    assert embed.bytes == 4 * 256 * (80 * 608 + 192 * 768)
    both = floors.masked_patch_embed(256, 80, 608, 768, 57, backward=True)
    assert both.flops / embed.flops == pytest.approx(1 + 57 / 190)

    # Four products of 34,048 x 2,048 x 256: 0.18 ms at 790 TFLOP/s.
    loss = floors.prototype_loss(34_048, 2048, 256, itemsize=2)
    assert loss.seconds(3.0e12, 790e12) == pytest.approx(4 * 2 * 34_048 * 2048 * 256 / 790e12)

    alone, five = floors.prediction_loss(10, 8), floors.prediction_loss(10, 8, heads=5, backward=True)
    assert alone == (4 * 10 * 8 * 2, 0)
    assert five == (4 * 10 * 8 * (6 + 6 + 5), 0)


def test_the_narrower_limit_is_the_floor():
    work = floors.Work(bytes=100, flops=10)
    assert work.seconds(100.0, 100.0) == 1.0
    assert work.seconds(1000.0, 10.0) == 1.0


@pytest.fixture
def result() -> dict:
    ops = [
        {"op": "log_mel", "size": "1 x 10 s", "variant": variant, "median_ms": ms, "bytes": 10**6, "flops": 0}
        | {"floor_ms": 0.1, "peak_extra_mib": 2.0, "first_call_ms": 9.0, "spread_ms": [0.9 * ms, 1.1 * ms]}
        for variant, ms in (("reference", 4.0), ("cpp", 0.5))
    ]
    step = {"preset": "tiny", "batch_size": 8, "speedup_over": "official float32"}
    ours = {
        "ms": 100.0,
        "first_ms": 3000.0,
        "spread_ms": [99.0, 102.0],
        "crops_per_s": 80.0,
        "gflop_per_s": 200.0,
        "speedup": 1.2,
    }
    step["rows"] = {"ours float32": ours}
    attention = {"preset": "tiny", "batch_size": 8, "precision": "float32"}
    attention["rows"] = [
        {"part": "student", "tokens": 58, "layers": 12, "backend": "flash", "ms": 2.0, "spread_ms": [1.9, 2.1]}
        | {"speedup": 1.5}
    ]
    point = {"ms": 20.0, "spread_ms": [19.0, 21.0], "ms_per_second": 125.0, "peak_mib": 300.0, "gmacs": 0.5}
    point |= {"gmacs_per_second": 3.0, "largest_batch": "~40", "seconds": 0.16}
    rows = [
        point | {"kind": kind, "backend": backend, "batch_size": batch}
        for kind, backend, batch in itertools.product(("embed", "train"), ("auto", "reference"), (1, 4))
    ]
    support = {"preset": "tiny", "device": "2 CPU threads", "torch": "2.13.0", "rows": rows}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "changes": [],
        "command": "python benchmarks/sheet.py",
        "device": "a CPU",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "exit_codes": {"tests": 0, "ops": 0},
        "left_out": {"sanitizer": "compute-sanitizer needs a GPU"},
        "ops": ops,
        "step": step,
        "attention": attention,
        "temporal_support": support,
        "profile": ["a training step, part by part", "student   1.00"],
    }


def write(path, result):
    path.write_text(json.dumps(result))
    return path


def test_tables(result):
    text = "\n".join(report.tables(result))
    assert "| `log_mel` 1 x 10 s, cpp | 0.5 | 2 GB/s | 20% | 8.00× | 2 | 9 |" in text
    assert "| ours float32 | 100 | 80.00 | 200 | 1.20× |" in text
    assert "| student, 58 tokens, flash | 2 | 24 | 1.50× |" in text
    assert "commit `012345678`, 2026-01-02, by `python benchmarks/sheet.py`" in text
    assert "Left out: compute-sanitizer needs a GPU." in text
    assert text.count("| embed, 0.16 s | 20.0 | 125.0 | 300.0 | 0.5 | 3.0 | ~40 |") == 1
    assert "student   1.00" in text
    short = "\n".join(report.short(result))
    assert "| `log_mel` 1 x 10 s | 0.5 | 20% | 8.0× |  |  |" in short
    assert "| ours float32 | 100 | 80.00 | 200 | 1.20× |" in short
    assert "student" not in short


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"changes": [" M a.py"]}, "the tree had changes"),
        ({"exit_codes": {"tests": 1}}, "tests ended with 1"),
        ({"exit_codes": {"ops": 0}}, "no test was run"),
    ],
)
def test_what_is_refused(result, change, reason, tmp_path):
    assert report.read(write(tmp_path / "good.json", result)) == result
    with pytest.raises(SystemExit, match=reason):
        report.read(write(tmp_path / "bad.json", result | change))


def test_two_results_compare_within_one_device_only(result):
    faster = json.loads(json.dumps(result))
    faster["ops"][1] |= {"median_ms": 0.25, "spread_ms": [0.2, 0.3]}
    lines = report.compare(result, faster)
    assert "    2.00x  (1.50 to 2.75)  log_mel 1 x 10 s cpp" in lines
    assert "    1.00x  (0.97 to 1.03)  step ours float32  no difference" in lines
    assert sum("embed 4 x 0.16 s reference" in line for line in lines) == 1
    with pytest.raises(SystemExit, match="different devices"):
        report.compare(result, result | {"device": "a GPU"})


def test_the_readme_is_filled_between_its_markers(result, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr("sys.argv", ["report.py", "--readme"])
    with pytest.raises(SystemExit, match="no result"):
        report.main()
    folder = tmp_path / "benchmarks" / "results" / "a-cpu"
    folder.mkdir(parents=True)
    write(folder / "2026-01-02-012345678.json", result)
    write(folder / "2025-01-02-012345678.json", result | {"date": "2025-01-02", "commit": "old"})
    (tmp_path / "benchmarks" / "results" / "b-cpu").mkdir()
    older = result | {"date": "2025-02-02", "device": "b CPU"}
    del older["temporal_support"]
    write(tmp_path / "benchmarks" / "results" / "b-cpu" / "2025-02-02-012345678.json", older)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.main()
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    drawn = []
    monkeypatch.setattr(report._plots, "temporal_support", lambda found, path: drawn.append((found, path.name)))
    report.main()
    assert drawn == [(result["temporal_support"], "temporal-support-a-cpu.png")]
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n\n**a CPU**")
    assert "(docs/temporal-support-a-cpu.png)" in text
    assert text.endswith(f"{report.END}\nafter\n")
    assert "stale" not in text
    assert "`old`" not in text
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks\n")
    assert "**b CPU**" in page
    assert "**b CPU**" not in text
    assert "| `log_mel` 1 x 10 s, cpp | 0.5 | 2 GB/s | 20% | 8.00× | 2 | 9 |" in page
    assert "](temporal-support-a-cpu.png)" in page


def test_a_case_knows_its_floor(monkeypatch):
    monkeypatch.setattr("_timing.bandwidth", lambda: 50.0)
    monkeypatch.setattr("_timing.matrix_rate", lambda dtype: 10.0)
    case = Case("log_mel", "", "cpp", lambda: lambda: None, floors.Work(100, 5))
    assert case.floor() == 2.0


def test_a_summary_has_median_and_quartiles():
    assert summary([0.004, 0.001, 0.002, 0.003, 0.005]) == {"ms": 3.0, "spread_ms": [2.0, 4.0]}
    assert summary([0.002]) == {"ms": 2.0, "spread_ms": [2.0, 2.0]}


def test_curves_of_temporal_support(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'matpac_fast[plots]'")
    report._plots.temporal_support(result["temporal_support"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def sheet(monkeypatch, tmp_path):
    """sheet.py with two stages, of which one takes too long or fails as asked, and results of its own."""
    module = importlib.import_module("sheet")
    monkeypatch.setattr(module, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "told", lambda *command: "0123456789" if "rev-parse" in command else "")
    out = tmp_path / "out"

    def run(tests: str = "print('3 passed in 1 s')", other: str = "pass", *arguments: str) -> tuple[int, dict]:
        step = f"open({str(out / 'step.json')!r}, 'w').write('{{\"rows\": {{}}}}'); {other}"
        stages = [
            module.Stage("tests", 60, [sys.executable, "-c", tests]),
            module.Stage("step", 60, [sys.executable, "-c", step]),
        ]
        monkeypatch.setattr(module, "stages", lambda *_: (stages, {"GPU kernels": "no CUDA device"}))
        monkeypatch.setattr("sys.argv", ["sheet.py", "--out", str(out), *arguments])
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        code = module.main()
        return code, json.loads((out / "sheet.json").read_text())

    return run


def recorded(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "benchmarks" / "results").rglob("*.json"))


def test_a_sheet_is_recorded_with_its_logs_in_one_file(sheet, tmp_path, capsys):
    code, found = sheet(other="print('hello')")
    assert (code, found["exit_codes"], found["tests"]) == (0, {"tests": 0, "step": 0}, "3 passed in 1 s")
    assert found["step"] == {"rows": {}}
    (record,) = recorded(tmp_path)
    assert report.read(record) == found
    assert record.name == f"{found['date'][:10]}-012345678.json"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "sheet.json"]
    assert "hello" in (tmp_path / "out" / "log.txt").read_text()
    assert "left out: GPU kernels: no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tests", "other", "arguments", "reason"),
    [
        ("exit(1)", "pass", [], "tests ended with 1"),
        ("pass", "exit(3)", [], "step ended with 3"),
        ("pass", "pass", ["--only", "step"], "no test was run"),
        ("pass", "pass", ["--dry-run"], "a dry run"),
    ],
)
def test_a_sheet_that_is_not_recorded(sheet, tmp_path, capsys, tests, other, arguments, reason):
    code, _ = sheet(tests, other, *arguments)
    assert code == int("ended" in reason)
    assert reason in capsys.readouterr().out
    assert recorded(tmp_path) == []


def test_a_stage_without_time_left_is_left_out(sheet, tmp_path):
    code, found = sheet("pass", "pass", "--minutes", "0.01")
    assert (code, found["exit_codes"]) == (0, {})
    assert found["left_out"]["step"] == "step had no time left of 0.01 minutes"
    assert recorded(tmp_path) == []


def test_a_stage_that_takes_too_long_is_ended_with_what_it_said(tmp_path, monkeypatch):
    module = importlib.import_module("sheet")

    def run(command, *, stdout, timeout, **_):
        stdout.write("begun\n")
        raise module.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.run(module.Stage("x", 60, ["x"]), 3, tmp_path / "log.txt") == (124, "begun\n")
