"""`matpac-fast study` and `probe`: what they write, what they say, and the report in a browser."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import cli, load_encoder
from matpac_fast.cli import probe
from matpac_fast.cli import study as study_command
from matpac_fast.cli._study_words import choice_cells, copies
from matpac_fast.cli.study import _paths
from matpac_fast.config import MatpacConfig
from matpac_fast.errors import ConfigError
from matpac_fast.model import Matpac
from matpac_fast.study import sweep
from matpac_fast.study.cost import Cost, measure_here
from matpac_fast.study.linear import ProbeConfig
from matpac_fast.study.results import Tables
from matpac_fast.study.sweep import StudyConfig
from tests.study.conftest import SMALL, clips, encoder_file  # noqa: F401
from tests.tasks import miniature

pytest.importorskip("matplotlib")


def measured_here(name, ts, batch, *_):
    return measure_here(load_encoder(name, "cpu"), name, ts, batch)


@pytest.fixture(scope="module")
def study(encoder_file, clips, tmp_path_factory):  # noqa: F811
    """A study of two encoders, its costs measured in this process."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "measure", measured_here)
        patch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
        other = shutil.copy(encoder_file, tmp_path_factory.mktemp("other") / "copy.safetensors")
        arguments = ["study", "--encoders", f"{encoder_file},{other}", "--tasks", f"folder:{clips}", "--out", str(out)]
        arguments += ["--temporal-support", "0.2,0.5", "--batch-sizes", "1,2", "--resamples", "50", "--device", "cpu"]
        assert cli.main([*arguments, "--workers", "1"]) == 0
    return out


def test_everything_is_written(study):
    rows = pq.read_table(study / "results.parquet").to_pylist()
    assert len(rows) == 2 * 2 * 3  # encoders, temporal supports, all clips and two subsets
    assert all(row["peak_mib"] > 0 and row["macs"] > 0 and row["encoder_id"] for row in rows)
    scores = [row["score"] for row in rows]
    assert scores[:6] == scores[6:]  # the same weights under two names
    assert len(pq.read_table(study / "comparisons.parquet")) == 4
    assert len(pq.read_table(study / "choices.parquet")) == 2
    pairs = pq.read_table(study / "encoders.parquet").to_pylist()
    assert [(row["difference"], row["low"], row["high"]) for row in pairs] == [(0.0, 0.0, 0.0)] * 2
    for name in ("score-tones", "pareto-tones", "cost", "latency"):
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((study / "settings.json").read_text())["made"]
    assert {"command", "device", "torch", "libsndfile"} <= set(made)
    assert made["probe"] == (
        "linear; learning rates 0.1, 1; decays 0.0001, 0.001, 0.01, 0.1, 1, 10; seeds: 3; at most 300 steps, checked "
        "every 10 and ended after 5 checks without gain; features standardised"
    )


def test_the_report_needs_nothing_from_outside(study):
    text = (study / "report.html").read_text()
    assert text.count('src="data:image/png;base64,') == 4
    bare = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?://|@import|url\(|<link|src=\"(?!\")", bare)


_CHECK = """<script>
const said = {errors: window.failed, images: [...document.images].map(i => i.naturalWidth), order: {}};
const table = document.getElementById('results');
const heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex(h => h.textContent === 'peak MiB');
const values = () => [...table.tBodies[0].rows].map(r => Number(r.cells[column].dataset.value));
heads[column].querySelector('button').click();
said.order.up = values();
heads[column].querySelector('button').click();
said.order.down = values();
const filter = table.parentElement.previousElementSibling;
filter.value = 'copy.safetensors';
filter.dispatchEvent(new Event('input'));
said.shown = [...table.tBodies[0].rows].filter(r => !r.hidden).length;
const out = document.createElement('pre');
out.id = 'said';
out.textContent = JSON.stringify(said);
document.body.append(out);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_report_in_a_browser(study, tmp_path):
    text = (study / "report.html").read_text()
    watch = "<script>window.failed = []; window.onerror = message => { window.failed.push(message); };</script>"
    page = tmp_path / "report.html"
    page.write_text(text.replace("<head>", "<head>" + watch, 1).replace("</body>", _CHECK + "</body>", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-500:]
    said = json.loads(html.unescape(found[1]))
    assert said["errors"] == []
    assert len(said["images"]) == 4
    assert min(said["images"]) > 500
    assert said["order"]["up"] == sorted(said["order"]["up"])
    assert said["order"]["down"] == sorted(said["order"]["up"], reverse=True)
    assert len(set(said["order"]["up"])) > 1
    assert said["shown"] == 6


def test_probe_says_the_studys_score(study, encoder_file, clips, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sweep, "probe", lambda *_: pytest.fail("the study's probes were not found"))
    arguments = ["probe", "--encoder", str(encoder_file), "--task", f"folder:{clips}", "--temporal-support", "0.5"]
    assert cli.main([*arguments, "--cache", str(study), "--resamples", "50", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    rows = [r for r in pq.read_table(study / "results.parquet").to_pylist() if r["temporal_support"] == 0.5][:3]
    for line, row in zip(lines, rows, strict=True):
        assert f"accuracy {row['score']:.4f} ({row['low']:.4f} to {row['high']:.4f})" in line
    assert "tones, even" in lines[1]


OPTIONS = [
    *("--hop", "0.25", "--remainder", "pad", "--aggregate", "score", "--learning-rates", "0.2,3", "--decays", "1e-5"),
    *("--probe-batch", "7", "--seeds", "2", "--no-standardize", "--resamples", "60", "--batch-size", "3", "--partial"),
    *("--split-seed", "4", "--workers", "1", "--device", "cpu", "--dtype", "bfloat16"),
]
ASKED = StudyConfig(
    encoders=("e",),
    tasks=("folder:a",),
    temporal_supports=(0.5,),
    hop=0.25,
    remainder="pad",
    aggregate="score",
    probe=ProbeConfig((0.2, 3.0), (1e-5,), seeds=2, standardize=False, batch=7, check_every=1, patience=20),
    batch_size=3,
    device="cpu",
    dtype="bfloat16",
    seed=4,
    partial=True,
    workers=1,
)


def test_every_option_of_probe_reaches_it_and_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    asked, cells = [], [SimpleNamespace(task=SimpleNamespace(name="a", left_out=[("x.wav", "missing")]))]
    monkeypatch.setattr(probe, "run_study", lambda config, out, hear: asked.append((config, out)) or cells)

    def tabulated(cells, margin, **options):
        asked.append((margin, options["resamples"]))
        return Tables()

    monkeypatch.setattr(probe, "tabulate", tabulated)
    arguments = ["probe", "--task", "folder:a", "--encoder", "e", "--temporal-support", "0.5", *OPTIONS]
    assert cli.main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    assert asked == [(dataclasses.replace(ASKED, cost=False), tmp_path / "cache"), (0.0, 60)]
    assert capsys.readouterr().out == "a: 1 clip is left out, missing, altered or damaged: x.wav: missing.\n"


def test_every_option_of_study_reaches_it(tmp_path, monkeypatch, capsys):
    asked, cells = [], [SimpleNamespace(costs=[])]
    monkeypatch.setattr(study_command, "run_study", lambda config, out, hear: asked.append((config, out)) or cells)

    def tabulated(cells, margin, cheapest_by, resamples, hear):
        asked.append((margin, cheapest_by, resamples))
        raise ConfigError("that is all")

    monkeypatch.setattr(study_command, "tabulate", tabulated)
    arguments = ["study", "--tasks", "folder:a", "--encoders", "e", "--temporal-support", "0.5", *OPTIONS]
    arguments += ["--margin", "0.02", "--cheapest-by", "macs", "--no-cost", "--batch-sizes", "2,5"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == cli.FAILED
    assert asked == [
        (dataclasses.replace(ASKED, cost=False, batch_sizes=(2, 5)), tmp_path),
        (0.02, "macs", 60),
    ]
    assert capsys.readouterr().err == "matpac-fast study: that is all\n"


def test_probe_tells_of_copies_among_training_and_test_clips(tmp_path, capsys):
    for label, pitch in (("low", 200), ("high", 900)):
        (tmp_path / label).mkdir()
        for i in range(5):
            soundfile.write(tmp_path / label / f"{i}.wav", np.sin(pitch * np.arange(1_600) / 16_000), 16_000)
    arguments = ["probe", "--encoder", "logmel-stats", "--task", f"folder:{tmp_path}", "--temporal-support", "0.1"]
    assert cli.main([*arguments, "--seeds", "1", "--resamples", "5", "--device", "cpu"]) == 0
    assert "10 test clips are copies of training clips, by their bytes." in capsys.readouterr().out
    assert copies([{"task": "t", "shared_audio": 1}]) == ["t: 1 test clip is a copy of training clips, by their bytes."]


def test_probe_warns_in_one_line_of_weights_that_are_untrained(tmp_path, capfd):
    random, rows = np.random.default_rng(0), []  # nothing is to be learnt
    for i in range(24):
        soundfile.write(tmp_path / f"{i}.wav", random.normal(0, 0.1, 1_600), 16_000)
        rows.append(dict(path=f"{i}.wav", label="ab"[i % 2], split=("train", "valid", "test")[i // 8]))
    miniature.table(tmp_path / "clips.csv", rows)
    arguments = ["probe", "--encoder", "logmel-stats", "--task", f"folder:{tmp_path}", "--temporal-support", "0.1"]
    arguments += ["--probe-batch", "8", "--learning-rates", "1e5", "--decays", "0", "--seeds", "1"]
    assert cli.main([*arguments, "--resamples", "5", "--device", "cpu"]) == 0
    said = capfd.readouterr()
    assert said.err == (
        "matpac-fast probe: warning: no step lowered the validation loss at learning rate 100000 for 1 of 1 seed, "
        "whose scores are those of untrained weights, as they were drawn; try smaller learning rates, such as 10000, "
        "or larger decays\n"
    )
    line = (
        f"{tmp_path.name}, logmel-stats: no step lowered the validation loss of 1 of 1 probes at 0.1 s, whose scores "
        "are those of untrained weights; smaller --learning-rates or larger --decays may train them."
    )
    assert said.out.splitlines()[1:] == [line]
    arguments = ["study", "--encoders", "logmel-stats", "--tasks", f"folder:{tmp_path}", *arguments[5:], "--no-cost"]
    for _ in range(2):  # the second time the probes are read
        assert cli.main([*arguments, "--resamples", "5", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
        assert line in capfd.readouterr().out
        assert line in html.unescape((tmp_path / "out/report.html").read_text())
        assert pq.read_table(tmp_path / "out/results.parquet")["untrained"].to_pylist() == [1]


def test_cost_only_needs_no_task(encoder_file, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sweep, "measure", measured_here)
    monkeypatch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
    arguments = ["study", "--encoders", str(encoder_file), "--cost-only", "--temporal-support", "0.2,0.5"]
    assert cli.main([*arguments, "--batch-sizes", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "times real time" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "cost.parquet")) == 2
    assert 'id="costs"' in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "results.parquet").exists()


def test_what_the_report_no_longer_tells_is_said(study, encoder_file, clips, tmp_path, capsys):  # noqa: F811
    out = shutil.copytree(study, tmp_path / "out")
    arguments = ["study", "--encoders", str(encoder_file), "--tasks", f"folder:{clips}", "--out", str(out)]
    arguments += ["--temporal-support", "0.2,0.5", "--resamples", "50", "--device", "cpu", "--no-cost"]
    line = "told of {} as well; to have all in one, name all encoders and tasks in one command"
    for told in (1, 0):  # once: the second time nothing more is lost
        assert cli.main(arguments) == 0
        said = capsys.readouterr().out
        assert len(re.findall(line.format(r"\S*copy\.safetensors on tones"), said)) == told
        assert not (out / "encoders.parquet").exists()  # it was of two


@pytest.mark.parametrize("kind", ["embeddings/*/part-*.parquet", "probes/*.npz", "cost.parquet", "results.parquet"])
def test_of_what_was_cut_short_it_says_what_to_do_and_results_are_made_anew(
    study,
    encoder_file,  # noqa: F811
    clips,  # noqa: F811
    tmp_path,
    capsys,
    kind,
):
    out = shutil.copytree(study, tmp_path / "out")
    arguments = ["study", "--encoders", str(encoder_file), "--tasks", f"folder:{clips}", "--out", str(out)]
    arguments += ["--temporal-support", "0.2,0.5", "--batch-sizes", "1,2", "--resamples", "50", "--device", "cpu"]
    for path in out.glob(kind):
        os.truncate(path, 100)
    code = cli.main([*arguments, "--workers", "1"])
    if kind == "results.parquet":
        assert code == 0
        assert len(pq.read_table(out / kind)) == 6
    else:
        assert code == cli.FAILED
        said = rf"matpac-fast study: {re.escape(str(out))}/\S+: damaged \(.*\): remove it and run the same again, .*\n"
        assert re.search(rf"(?m)^{said}\Z", capsys.readouterr().err)


@pytest.mark.parametrize(("high", "told"), [(14.0, True), (12.5, False)])
def test_of_times_that_differ_much_between_runs_it_warns_once(high, told, tmp_path, capsys, monkeypatch):
    def measured(name, ts, batch, *_):
        cost = Cost(name, name, ts, batch, "cpu", "float32", 1, 10, 10, 10.0, 9.5, 10.5, 5, 1.0, 1.0, 16_000, 8, "", "")
        return dataclasses.replace(cost, batch_ms_high=high) if ts < 1 else cost

    monkeypatch.setattr(sweep, "measure", measured)
    arguments = ["study", "--encoders", "logmel-stats", "--cost-only", "--temporal-support", "0.5,0.6,2"]
    assert cli.main([*arguments, "--batch-sizes", "4", "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    line = (
        "Times are uncertain at 2 of 3 points, most at logmel-stats, 0.5 s, batch 4: half of its runs took 9.5 to 14 ms"
    )
    assert (line in said) == told
    assert said.count("uncertain") == told
    assert (f"<li>{line}" in (tmp_path / "report.html").read_text()) == told


def test_of_several_processes_the_first_measures_costs(encoder_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured beside the first process"))
    arguments = ["study", "--encoders", str(encoder_file), "--cost-only", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    assert not (tmp_path / "out").exists()


def test_processes_that_share_a_probe_need_a_folder_for_it(encoder_file, clips, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["probe", "--encoder", str(encoder_file), "--task", f"folder:{clips}", "--device", "cpu"]) == 2
    assert "--cache is missing: 2 processes share the embeddings" in capsys.readouterr().err


def test_changes_are_told_as_such(study):
    tables = Tables(choices=pq.read_table(study / "choices.parquet").to_pylist())
    header, body = choice_cells(tables)
    assert header[-2:] == ["memory change", "time change"]
    tables.choices[0].update(memory_saved=0.0, time_saved=0.25)
    assert choice_cells(tables)[1][0][-2:] == ["same", "-25 %"]
    assert all(cell for line in body for cell in line)


def test_without_costs_nothing_is_cheaper_and_what_is_left_out_is_named(
    encoder_file,  # noqa: F811
    clips,  # noqa: F811
    tmp_path,
    capsys,
):
    folder = shutil.copytree(clips, tmp_path / "tones")
    soundfile.write(folder / "0-0.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    common = ["--resamples", "20", "--device", "cpu", "--workers", "1", "--seeds", "1", "--partial"]
    arguments = ["--encoders", str(encoder_file), "--tasks", f"folder:{folder}", "--temporal-support", "0.2,0.5"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "problems.txt").write_text("of an earlier study, mended since\n")
    assert cli.main(["study", *arguments, "--margin", "0.9", "--no-cost", "--out", str(out), *common]) == 0
    assert not (out / "problems.txt").exists()
    said = capsys.readouterr().out
    assert "cheap" not in said
    assert "memory" not in said
    line = f"tones: 1 clip is left out, missing, altered or damaged: {folder / '0-0.wav'}: not finite"
    assert line in said
    assert "1 clip is left out" in (out / "report.html").read_text()
    assert "cheapest" not in (out / "report.html").read_text()
    assert "The best is chosen on validation clips" in (out / "report.html").read_text()
    arguments = ["--encoder", str(encoder_file), "--task", f"folder:{folder}", "--temporal-support", "0.5"]
    assert cli.main(["probe", *arguments, "--cache", str(out), *common]) == 0
    said = capsys.readouterr().out
    assert line in said
    assert "11 test clips" in said


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("study", ["--margin", "-1"], "--margin is -1; expected 0 or more"),
        ("study", ["--margin", "nan"], "--margin is nan"),
        ("study", ["--resamples", "0"], "--resamples is 0; expected at least 1"),
        ("probe", ["--resamples", "-5"], "--resamples is -5"),
        ("study", ["--batch-sizes", "1,inf"], "--batch-sizes has inf; expected whole numbers"),
        ("study", ["--temporal-support", "0,1"], "study: temporal support is 0 s; expected a number of seconds from"),
        ("study", ["--temporal-support", "1,-2"], "study: temporal support is -2 s; expected"),
        ("study", ["--temporal-support", "nan"], "study: temporal support is nan s; expected"),
        ("study", ["--hop", "0"], "study: hop is 0 s; expected"),
        ("probe", ["--temporal-support", "0"], "study: temporal support is 0 s; expected"),
        ("study", ["--workers", "0"], "workers 0; expected 1 or more"),
        ("probe", ["--probe-batch", "8", "--decays", "1e-3,nan"], "decays (0.001, nan); expected finite, positive"),
        ("study", ["--learning-rates", "0.1,inf"], "learning rates (0.1, inf), decays"),
        ("probe", ["--probe-batch", "0"], "probe: batch is 0; expected at least 1"),
        ("study", ["--probe-batch", "128", "--aggregate", "attend"], "probe is trained on all clips at once"),
    ],
)
def test_numbers_that_cannot_be_end_it_before_any_work(command, options, said, tmp_path, capsys):
    needed = ["--encoders", "e", "--tasks", "folder:x", "--out", str(tmp_path / "out")]
    needed = needed if command == "study" else ["--task", "folder:x"]
    assert cli.main([command, *needed, *options, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["manifest.parquet", "settings.json", "shard-00000"], "is not empty and holds no study"),
        (["index.parquet", "shards/00000.pcm"], "is not empty and holds no study"),
        (["embeddings/settings.json", "embeddings/manifest.parquet"], "is not empty and holds no study"),
        (["settings.json", "embeddings/a-b/settings.json"], "holds a settings.json that is not a study's"),
        ([""], "a file, where a folder for the study was expected"),
    ],
)
def test_nothing_is_written_into_a_folder_of_something_else(there, said, tmp_path, capsys):
    out = tmp_path / "out"
    for name in there:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"encoder": "e"}')
    before = sorted(tmp_path.rglob("*"))
    study = ["study", "--encoders", "nobody", "--tasks", "folder:x", "--out", str(out), "--device", "cpu"]
    probe = ["probe", "--encoder", "nobody", "--task", "folder:x", "--cache", str(out), "--device", "cpu"]
    for command, option in ((study, "--out"), ([*study, "--cost-only"], "--out"), (probe, "--cache")):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert said in err
        assert option in err
    assert sorted(tmp_path.rglob("*")) == before
    assert all((out / name).read_text() == '{"encoder": "e"}' for name in there)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--encoders", "e"], "--tasks is missing"),
        (["--encoders", "nobody", "--tasks", "folder:CLIPS"], "no encoder 'nobody'"),
        (["--encoders", "untrained-tiny", "--tasks", "esc51:x"], "task 'esc51:x'; expected NAME:FOLDER"),
        (["--encoders", "untrained-tiny", "--cost-only", "--temporal-support", "a,1"], "expected numbers"),
    ],
)
def test_errors_are_one_line(arguments, said, clips, tmp_path, capsys):  # noqa: F811
    arguments = [word.replace("CLIPS", str(clips)) for word in arguments]
    assert cli.main(["study", *arguments, "--no-cost", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_interrupted_it_says_that_it_goes_on(clips, tmp_path, capsys, monkeypatch):  # noqa: F811
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("matpac_fast.cli.study.run_study", interrupted)
    needed = ["--encoders", "logmel-stats", "--tasks", f"folder:{clips}", "--out", str(tmp_path / "out")]
    assert cli.main(["study", *needed, "--device", "cpu"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "what is embedded, probed and measured is kept; the same command goes on from there",
        "matpac-fast study: interrupted",
    ]


def test_an_incomplete_data_set_is_named_file_by_file(tmp_path, capsys):
    miniature.esc50(tmp_path / "esc")
    missing = {path: path.read_bytes() for path in sorted((tmp_path / "esc/audio").iterdir())[:7]}
    for path in missing:
        path.unlink()
    arguments = [
        "study",
        "--encoders",
        "untrained-tiny",
        "--tasks",
        f"esc50:{tmp_path / 'esc'}",
        "--out",
        str(tmp_path / "out"),
    ]
    for _ in range(2):  # a folder with nothing but problems.txt is still the study's
        assert cli.main([*arguments, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert "esc50" in err
        assert len(err.strip().splitlines()) == 1
    named = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert named[0] == "meta/esc50.csv: altered: 15 clips, officially 2000"
    assert sum(line.endswith(": missing") for line in named) == 7
    for path in list(missing)[:5]:
        path.write_bytes(missing[path])
    assert cli.main([*arguments, "--device", "cpu"]) == 2  # and the few that are left one line names
    assert "problems.txt" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "problems.txt").exists()


def test_a_path_that_is_there_may_hold_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Smith, J., sounds").mkdir()
    Path("run,1").touch()
    assert _paths("folder:Smith, J., sounds, folder:b") == ("folder:Smith, J., sounds", "folder:b")
    assert _paths("run,1,run,2,beats:run,1,") == ("run,1", "run", "2", "beats:run,1")
    ended = ("run,1@teacher", "run,1@20000@teacher", "run@2", "matpac:run,1@teacher@20000")
    assert _paths(",".join(ended)) == ended


def test_student_and_teacher_are_told_apart_by_name(clips, tmp_path):  # noqa: F811
    for step in (2, 10):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        config = MatpacConfig(**SMALL, predictor_heads=2, predictor_depth=1, seed=step)
        Matpac(config).save(folder / "model.safetensors")
    names = [f"{tmp_path}/run{ending}" for ending in ("", "@teacher", "@2@teacher")]
    arguments = ["study", "--encoders", ",".join(names), "--tasks", f"folder:{clips}", "--out", str(tmp_path / "out")]
    arguments += ["--temporal-support", "0.5", "--learning-rates", "1e-2", "--decays", "0", "--seeds", "1", "--no-cost"]
    arguments += ["--probe-batch", "16"]
    assert cli.main([*arguments, "--resamples", "5", "--device", "cpu", "--workers", "1"]) == 0
    rows = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert list(dict.fromkeys(row["encoder"] for row in rows)) == names
    assert len({row["encoder_id"] for row in rows}) == 3
    kept = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "out" / "embeddings").iterdir())
    assert kept == ["run", "run-2-teacher", "run-teacher"]
    made = json.loads((tmp_path / "out" / "settings.json").read_text())["made"]
    assert (
        "at most 300 passes in batches of 16, checked every 1 and ended after 20 checks without gain" in made["probe"]
    )
