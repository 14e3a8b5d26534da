"""Which results the README's tables accept, and what they say of them."""

from __future__ import annotations

import itertools
import json

import pytest
import report


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


def test_curves_of_temporal_support(result, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'matpac_fast[plots]'")
    report._plots.temporal_support(result["temporal_support"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_with_turns_has_their_ratio_and_an_older_one_that_of_its_medians(result):
    reference, ours = result["ops"]
    assert report.speedup(ours, reference) == 8.0
    assert report.speedup(ours | {"over": {"reference": 7.5}}, reference) == 7.5
