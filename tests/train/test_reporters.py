"""Curves and TensorBoard: what is on disk is what the log says."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import pytest

from matpac_fast.errors import ConfigError
from matpac_fast.train import pretrain, read_log, reporters
from matpac_fast.train.logs import Reporter, Reporters
from matpac_fast.train.reporters import Curves, TensorBoard, draw_curves


def size(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_a_run_leaves_its_curves_and_its_scalars(tmp_path, corpus, model_config, train_config):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    config = dataclasses.replace(train_config, probe_every=4)
    scores = iter(range(10))
    stops = iter([False] * 5 + [True])

    def probe(state, model):
        assert state["teacher.norm.weight"].shape == (model.width,)
        return {"student_knn": next(scores) / 10, "clips": 7}

    def go(stop):
        reporter = Reporters(Curves(), TensorBoard(run / "tensorboard"))
        pretrain(corpus, run, model_config, config, "cpu", reporter=reporter, stop=stop, probe=probe)

    go(lambda: next(stops))
    first = size(run / "curves.png")
    go(lambda: False)
    assert size(run / "curves.png") == first  # the same panels, one of them the probe's
    draw_curves(run / "log.jsonl", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (run / "curves.png").read_bytes()  # the run's last probe is in it

    found = events.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    records = read_log(run / "log.jsonl")
    for name in ("loss", "effective_rank", "crops_per_s"):
        want = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if "loss" in r]
        assert [(event.step, event.value) for event in found.Scalars(f"train/{name}")] == want
    assert [(e.step, round(e.value, 3)) for e in found.Scalars("probe/student_knn")] == [
        (0, 0.0),
        (4, 0.1),
        (8, 0.2),
        (12, 0.3),
    ]


def test_what_a_killed_run_had_written_beyond_its_checkpoint_stands_there_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done in (0, 1):
        board = TensorBoard(tmp_path)
        board.record({"event": "resume", "step": done, "text": f"after {done}"})
        for step in (1, 2, 3)[done:]:
            board.record({"step": step, "loss": float(done)})
        board.saved(tmp_path, 3)  # from here on it is to be seen
        found = events.EventAccumulator(str(tmp_path))
        found.Reload()
        board.close()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 0.0), (2, 1.0), (3, 1.0)]
    assert "resume/text_summary" in found.Tags()["tensors"]


def test_a_picture_that_fails_is_warned_of_once_and_the_run_goes_on(
    tmp_path, corpus, model_config, train_config, monkeypatch
):
    def broken(log, out, shown):
        raise ValueError("a font without glyphs")

    monkeypatch.setattr(reporters, "draw_curves", broken)
    with pytest.warns(UserWarning, match=r"curves\.png could not be drawn") as warned:
        assert pretrain(corpus, tmp_path / "run", model_config, train_config, "cpu", reporter=Curves()).finished
    (told,) = [str(warning.message) for warning in warned if "curves.png" in str(warning.message)]
    assert told.endswith("run/curves.png could not be drawn, training goes on: ValueError: a font without glyphs")
    assert read_log(tmp_path / "run" / "log.jsonl")[-1] == {"event": "finished", "step": 12}
    assert (tmp_path / "run" / "latest").read_text() == "step-00000012\n"


def test_curves_are_drawn_with_each_checkpoint_and_each_probe_after_one(tmp_path, monkeypatch):
    drawn, curves = [], Curves()
    monkeypatch.setattr(reporters, "draw_curves", lambda log, out, shown: drawn.append(out))
    probe, line = {"event": "probe", "step": 0, "student_knn": 0.5}, {"step": 1, "loss": 1.0}
    curves.record(probe)
    assert drawn == []  # there is no folder yet
    curves.saved(tmp_path, 1)
    curves.record(line)
    curves.record(probe)
    assert drawn == 2 * [tmp_path / "curves.png"]


def test_curves_show_what_is_there(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "lr": 0.1}\n{"step": 2, "loss": "nan", "lr": 0.2}\n{"event": "skipped", "step": 2}\n'
    )
    draw_curves(tmp_path / "log.jsonl", tmp_path / "a.png")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"event": "probe", "step": 2, "student_knn": 0.5}\n')
    draw_curves(tmp_path / "log.jsonl", tmp_path / "b.png")
    assert size(tmp_path / "b.png")[1] > size(tmp_path / "a.png")[1]  # one row of panels more


def test_a_log_is_read_on_from_where_it_was_drawn_last(tmp_path, monkeypatch):
    log, read, real = tmp_path / "log.jsonl", [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or real(line))
    curves = Curves()
    for step in range(1, 5):
        line, probe = {"step": step, "loss": step / 7}, {"event": "probe", "step": step, "student_knn": 0.5}
        with open(log, "a") as file:
            file.write(f"{json.dumps(line)}\n{json.dumps(probe)}\n")
        curves.saved(tmp_path, step)
    assert len(read) == 8  # each line once
    draw_curves(log, tmp_path / "anew.png")
    assert (tmp_path / "anew.png").read_bytes() == (tmp_path / "curves.png").read_bytes()

    other = tmp_path / "other"  # as a run that is gone on with writes it
    other.write_text(log.read_text()[: log.read_text().index("0.5") + 5] + '{"step": 2, "loss": 0.9}\n{"step": 3, "lo')
    other.replace(log)
    curves.saved(tmp_path, 2)
    draw_curves(log, tmp_path / "anew.png")
    assert (tmp_path / "anew.png").read_bytes() == (tmp_path / "curves.png").read_bytes()


def test_of_many_points_none_that_stands_out_is_left_out(tmp_path):
    values = [0.5] * 100_000
    values[4_321], values[54_321], values[-1] = 9.0, -9.0, 0.75
    lines = (f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values))
    (tmp_path / "log.jsonl").write_text("".join(lines))
    shown = reporters.Shown()
    shown.read(tmp_path / "log.jsonl")
    steps, drawn = shown.curve("loss")
    assert 1000 < len(steps) == len(drawn) < 3000
    assert (steps[1:] >= steps[:-1]).all()
    assert {(4_321, 9.0), (54_321, -9.0), (99_999, 0.75)} <= set(zip(steps.tolist(), drawn.tolist(), strict=True))


def test_no_picture_is_drawn_of_nothing(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "stopped", "step": 1}\n')
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_every_score_is_drawn_and_no_legend_covers_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    scores = [f"{of}_{score}" for of in ("student", "teacher", "statistics") for score in ("knn", "linear")]
    lines = [{"step": 1, "loss": 1.0, "loss_pred": 0.5, "loss_cls": 0.5}]
    lines += [{"event": "probe", "step": step} | dict.fromkeys(scores, 0.5) for step in (0, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    axes = figures[0].axes
    assert [line.get_label() for line in axes[-1].lines] == scores
    for panel in (axes[0], axes[-1]):
        legend, title = panel.get_legend().get_window_extent(), panel._left_title.get_window_extent()
        assert legend.y0 >= panel.get_window_extent().y1 - 1
        assert legend.x0 >= title.x1  # beside it, not upon it
        assert figures[0].bbox.y1 >= legend.y1


@pytest.mark.parametrize(
    ("module", "make", "says"),
    [
        ("matplotlib.figure", Curves, r"pip install 'matpac_fast\[plots\]'"),
        ("torch.utils.tensorboard", lambda: TensorBoard("x"), r"pip install 'matpac_fast\[tensorboard\]'"),
    ],
)
def test_what_is_not_installed_is_said(monkeypatch, module, make, says):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=says):
        make()


def test_reporters_are_told_in_order(tmp_path):
    told = []

    class Teller(Reporter):
        def __init__(self, name):
            self.name = name

        def step(self, step):
            told.append((self.name, "step", step))

        def record(self, record):
            told.append((self.name, "record", record["step"]))

        def saved(self, folder, step):
            told.append((self.name, "saved", step))

        def close(self):
            told.append((self.name, "close", None))

    both = Reporters(Teller("a"), Teller("b"))
    both.step(1)
    both.record({"step": 2})
    both.saved(tmp_path, 3)
    both.close()
    calls = [("step", 1), ("record", 2), ("saved", 3), ("close", None)]
    assert told == [(name, *call) for call in calls for name in ("a", "b")]


@pytest.mark.parametrize("fails", ["step", "record", "saved", "close"])
def test_a_reporter_that_fails_ends_neither_the_run_nor_the_others(tmp_path, corpus, model_config, train_config, fails):
    calls, heard = [], []

    class Board(Reporter):
        pass

    def offline(self, *args):
        calls.append(args)
        raise ConnectionError("the board is unreachable\nRequest 7")

    setattr(Board, fails, offline)

    class Other(Reporter):
        def record(self, record):
            heard.append(record)

    reporter = Reporters(Reporters(Board()), Other())
    with pytest.warns(UserWarning, match="unreachable") as warned:
        assert pretrain(corpus, tmp_path / "run", model_config, train_config, "cpu", reporter=reporter).finished
    text = f"Board.{fails} failed, training goes on: ConnectionError: the board is unreachable"
    assert [str(told.message) for told in warned] == [text]
    assert len(calls) == {"step": 12, "record": 8 + (fails == "record"), "saved": 3, "close": 1}[fails]
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert heard == records
    assert [r["text"] for r in records if r.get("event") == "warning"] == [text] * (fails != "close")
    assert records[-1]["event"] == "finished"
    assert (tmp_path / "run" / "latest").read_text() == "step-00000012\n"


def test_who_interrupts_a_reporter_ends_the_run(tmp_path, corpus, model_config, train_config):
    class Interrupted(Reporter):
        def record(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, tmp_path / "run", model_config, train_config, "cpu", reporter=Reporters(Interrupted()))
