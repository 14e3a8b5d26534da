"""The sheet: what it runs, in which order and for how long, and what of it is recorded."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import report


@pytest.fixture
def sheet(monkeypatch, tmp_path):
    """sheet.py with two stages, of which one takes too long or fails as asked, and results of its own."""
    module = importlib.import_module("sheet")
    monkeypatch.setattr(module, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(module, "told", lambda *command: "0123456789" if "rev-parse" in command else "")
    monkeypatch.delenv("COMMIT", raising=False)
    out = tmp_path / "out"

    def run(
        tests: str = "print('3 passed in 1 s')", other: str = "pass", *arguments: str, stages: list | None = None
    ) -> tuple[int, dict]:
        step = f"open({str(out / 'step.json')!r}, 'w').write('{{\"rows\": {{}}}}'); {other}"
        two = [
            module.Stage("tests", [sys.executable, "-c", tests], 60),
            module.Stage("step", [sys.executable, "-c", step], 60),
        ]
        monkeypatch.setattr(module, "stages", lambda *_: (stages or two, {"GPU kernels": "no CUDA device"}))
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


def test_a_tree_without_its_git_is_recorded_under_the_commit_it_is_said_to_be(sheet, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("sheet"), "told", lambda *_: "")
    assert sheet()[1]["commit"] == "unknown"
    assert recorded(tmp_path) == []
    monkeypatch.setenv("COMMIT", "fedcba9876543210")
    assert sheet()[1]["commit"] == "fedcba9876543210"
    assert [path.stem[-9:] for path in recorded(tmp_path)] == ["fedcba987"]


def test_a_stage_without_time_left_is_left_out(sheet, tmp_path):
    code, found = sheet("pass", "pass", "--minutes", "0.01")
    assert (code, found["exit_codes"]) == (0, {})
    assert found["left_out"]["step"] == "step had no time left of 0.01 minutes"
    assert recorded(tmp_path) == []


def test_a_stage_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    module = importlib.import_module("sheet")
    os.mkfifo(tmp_path / "held")
    reader = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    stage = module.Stage("x", ["sh", "-c", f"sleep 60 >{tmp_path / 'held'} & echo begun; wait"])
    assert module.run(stage, 2, tmp_path / "log.txt") == (module.CUT, "begun\n")
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):  # as long as the child holds the other end
            assert os.read(reader, 1) == b""
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the stage has started goes on")
    os.close(reader)


def test_what_a_stage_is_given(tmp_path):
    module = importlib.import_module("sheet")
    says = "import os, sys; print(sys.argv[1:], os.environ['PYTHONSAFEPATH'], os.environ.get('MORE'))"
    stage = module.Stage("x", [sys.executable, "-c", says], limit=150, env={"MORE": "1"})
    assert module.run(stage, 90, tmp_path / "log.txt") == (0, "['--limit', '70'] 1 1\n")
    assert module.run(stage, 400, tmp_path / "log.txt")[1].startswith("['--limit', '150']")


def test_no_stage_takes_what_the_next_ones_need():
    module = importlib.import_module("sheet")
    first, second, third = (module.Stage(name, [], 100, 30) for name in "abc")
    assert module.share(first, [second, third], 500) == 100
    assert module.share(first, [second, third], 120) == 60
    assert module.share(first, [second, third], 80) == 30  # the most urgent have theirs
    assert module.share(third, [], 20) == 20


def test_a_benchmark_that_is_cut_off_does_not_stop_the_rest(sheet, tmp_path, monkeypatch):
    module = importlib.import_module("sheet")
    run = module.run
    monkeypatch.setattr(module, "run", lambda s, seconds, log: run(s, 1 if s.name == "step" else seconds, log))
    code, found = sheet(other="import time; time.sleep(60)")
    assert (code, found["exit_codes"]) == (1, {"tests": 0})
    assert "was cut off after 60 s" in found["left_out"]["step"]
    assert [report.read(path) for path in recorded(tmp_path)] == [found]


def test_what_the_sanitizer_finds_is_told_and_the_rest_recorded(sheet, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("sheet")
    summary = "========= ERROR SUMMARY: 3 errors"

    def run(stage, *_):
        return (9, f"2 passed\n{summary}\n") if stage.name == "sanitizer" else (0, "3 passed")

    monkeypatch.setattr(module, "run", run)
    stages = [module.Stage("tests", []), module.Stage("sanitizer", [])]
    code, found = sheet(stages=stages)
    assert (code, found["exit_codes"]) == (1, {"tests": 0, "sanitizer": 9})
    assert "SANITIZER ended with 9: ERROR SUMMARY: 3 errors" in capsys.readouterr().out
    (path,) = recorded(tmp_path)
    assert "compute-sanitizer ended with 9: ERROR SUMMARY: 3 errors." in "\n".join(report.tables(report.read(path)))


def test_nothing_runs_where_a_kernel_of_the_gpu_is_missing(sheet, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("sheet")
    monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(module, "machine", lambda: {"device": "a GPU", "versions": {}})
    monkeypatch.setattr(module.backend, "unavailable", lambda name: "not built" if name == "cuda" else None)
    with pytest.raises(FileNotFoundError):  # no sheet
        sheet()
    assert "sheet: cuda: not built" in capsys.readouterr().err
    code, found = sheet("pass", "pass", "--incomplete")
    assert (code, found["left_out"]["cuda kernels"]) == (0, "not built")
    assert "kernels are missing" in capsys.readouterr().out
    assert recorded(tmp_path) == []


def test_the_stages_of_a_gpu(monkeypatch, tmp_path):
    module = importlib.import_module("sheet")
    monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(module, "installed", lambda package: True)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    found, _ = module.stages(tmp_path, dry=False)
    assert [stage.name for stage in found] == list(module.BOUNDS)
    assert sum(stage.least for stage in found) < 450  # what a build leaves of 570 s
    by_name = {stage.name: stage for stage in found}
    assert by_name["tests"].command[-2:] == ["-n", "8"]
    assert by_name["sanitizer"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    source = (Path(__file__).parent / "test_gpu.py").read_text()
    for name in module.SANITIZED.split(" or "):
        assert re.search(rf"def test_\w*{name}", source), name
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert "-n" not in module.stages(tmp_path, dry=False)[0][0].command


def test_two_sheets_become_one(sheet, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("sheet")
    _, first = sheet("print('3 passed')", "pass", "--only", "tests")
    capsys.readouterr()
    _, second = sheet("pass", "pass", "--only", "step")
    assert "no test was run" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "benchmarks" / "results")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, part in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(part))
    monkeypatch.setattr("sys.argv", ["sheet.py", "--out", str(tmp_path / "out"), "--join", *map(str, files)])
    assert module.main() == 0
    (path,) = recorded(tmp_path)
    whole = report.read(path)
    assert (whole["tests"], whole["exit_codes"], whole["step"]) == ("3 passed", {"tests": 0, "step": 0}, {"rows": {}})
    cut = second | {"step": {"rows": {"part": {}}}, "exit_codes": {}, "left_out": {"step": "cut off"}}
    assert module.join([first, second, cut])["step"] == {"rows": {}}
    whole = module.join([first, cut, second])
    assert (whole["step"], whole["left_out"]) == ({"rows": {}}, first["left_out"])
    assert module.join([first, cut])["left_out"]["step"] == "cut off"
    with pytest.raises(SystemExit, match="commit differs"):
        module.join([first, second | {"commit": "another"}])
