"""What the benchmarks count, and which results the README's tables accept."""

from __future__ import annotations

import json

import floors
import pytest
import report
from _timing import Case


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


def test_the_narrower_limit_is_the_floor():
    work = floors.Work(bytes=100, flops=10)
    assert work.seconds(100.0, 100.0) == 1.0
    assert work.seconds(1000.0, 10.0) == 1.0


@pytest.fixture
def result() -> dict:
    ops = [
        {"op": "log_mel", "size": "1 x 10 s", "variant": variant, "median_ms": ms, "bytes": 10**6, "flops": 0}
        | {"floor_ms": 0.1, "peak_extra_mib": 2.0}
        for variant, ms in (("reference", 4.0), ("cpp", 0.5))
    ]
    step = {"preset": "tiny", "batch_size": 8, "speedup_over": "official float32"}
    step["rows"] = {"ours float32": {"ms": 100.0, "crops_per_s": 80.0, "gflop_per_s": 200.0, "speedup": 1.2}}
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
    }


def write(path, result):
    path.write_text(json.dumps(result))
    return path


def test_tables(result):
    text = "\n".join(report.tables(result))
    assert "| `log_mel` 1 x 10 s, cpp | 0.5 | 2 GB/s | 20% | 8.00× | 2 |" in text
    assert "| ours float32 | 100 | 80.00 | 200 | 1.20× |" in text
    assert "commit `012345678`, 2026-01-02, by `python benchmarks/sheet.py`" in text
    assert "Left out: compute-sanitizer needs a GPU." in text


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
    faster["ops"][1]["median_ms"] = 0.25
    assert "    2.00x  log_mel 1 x 10 s cpp" in report.compare(result, faster)
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
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.main()
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.main()
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n\n**a CPU**")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "stale" not in text
    assert "`old`" not in text


def test_a_case_knows_its_floor(monkeypatch):
    monkeypatch.setattr("_timing.bandwidth", lambda: 50.0)
    monkeypatch.setattr("_timing.matrix_rate", lambda dtype: 10.0)
    case = Case("log_mel", "", "cpp", lambda: lambda: None, floors.Work(100, 5))
    assert case.floor() == 2.0
