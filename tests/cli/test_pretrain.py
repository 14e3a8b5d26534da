"""The command on a corpus on disk: what it prints, writes and returns; going on, refusing, being stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast import cli
from matpac_fast.audio.prepare import prepare
from matpac_fast.cli import pretrain as pretrain_command
from matpac_fast.config import MatpacConfig
from matpac_fast.encoder import load_encoder
from matpac_fast.model import Matpac
from matpac_fast.train import Result, TrainConfig, read_log
from matpac_fast.train.config import resolve_precision
from matpac_fast.weights import PACKAGED

# The smallest run there is: 320 ms crops of the tiny preset.
AUTO = resolve_precision("auto", torch.device("cpu"))  # bf16 on a processor that computes in it
SMALL = ["--preset", "tiny", "--crop-seconds", "0.32", "--batch-size", "2", "--device", "cpu", "--log-every", "2"]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*options):
    return cli.main(["pretrain", *map(str, options)])


def test_a_run_ends_with_an_encoder_and_goes_on_without_options(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(corpus, "--out", out, "--steps", 4, *SMALL) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("starting: 7.")
    assert f"4 clips (1 shorter than a crop are left out), 2 crops a step, {AUTO} on cpu" in said[0]
    assert [line.split("  ")[0] for line in said[1:3]] == ["step 2/4", "step 4/4"]
    assert "crops/s  ETA 0:00:" in said[1]
    assert said[3] == f"finished at step 4 of 4: {out}"
    encoder = load_encoder(out, "cpu")
    assert encoder.embedding_dim == 960
    # Finished already: the run's own options are taken, nothing is trained.
    assert run(corpus, "--out", out, "--device", "cpu") == 0
    done = ["nothing to do, the run was complete already", f"finished at step 4 of 4: {out}"]
    assert capsys.readouterr().out.splitlines()[:2] == done
    # Nor is anything read to be probed.
    assert run(corpus, "--out", out, "--device", "cpu", "--probe-data", tmp_path / "nowhere") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{done[0]}: nothing was probed"
    assert run(corpus, "--out", out, "--device", "cpu", "--dry-run", "--probe-data", tmp_path / "nowhere") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("about 0:00:00 for the 0 steps that are left")


def test_a_run_of_slow_steps_says_after_the_first_how_long_it_will_take(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pretrain_command.time, "monotonic", lambda: now[0])

    def said(device, seconds, events=()):
        watcher = pretrain_command._Watcher(TrainConfig(steps=294_816, log_every=20))
        config = {"train": {"batch_size": 32, "precision": "float32"}}
        start = {"event": "start", "step": 0, "config": config, "device": device, "ranks": 1}
        watcher.record({**start, "parameters": 10**6, "clips": 9, "clips_left_out": 0})
        for event in events:  # a probe before the first step is not the step's time
            now[0] += 1000
            watcher.record(event)
        for step in (1, 2):
            now[0] += seconds
            watcher.step(step)
        return [line for line in capsys.readouterr().out.splitlines() if "first step" in line]

    slow = (
        "the first step took 142.0 s: about 484 days, 12:48:50 for the 294815 that are left; "
        "a smaller --preset or fewer --steps, in a new folder, take less"
    )
    assert said("cpu", 142) == [slow]
    assert said("cpu", 142, [{"event": "probe", "step": 0}]) == [slow]
    assert said("cpu", 1.4) == []  # the log's first line comes soon enough
    assert said("NVIDIA H200", 142) == []


def test_what_happens_in_a_run_is_a_line_on_the_screen(capsys):
    watcher = pretrain_command._Watcher(TrainConfig(steps=40, batch_size=8))
    config = {"train": {"batch_size": 8, "precision": "bf16"}}
    resume = {"event": "resume", "step": 12, "config": config, "device": "NVIDIA H200", "ranks": 2}
    watcher.record({**resume, "parameters": 10**6, "clips": 9, "clips_left_out": 0})
    watcher.record({"step": 20, "loss": 1.5, "crops_per_s": 16.0, "mfu": 0.42})
    watcher.record({"event": "skipped", "step": 21, "text": "loss or gradient not finite", "clips": []})
    watcher.record({"event": "unreadable", "step": 22, "text": "shards/00001.i16: cut short"})
    watcher.record({"event": "warning", "step": 23, "text": "collapsing"})
    watcher.record({"event": "probe", "step": 24, "student_knn": 0.5, "teacher_linear": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "going on after step 12: 1.0 M trained parameters, 9 clips, 8 crops a step, bf16 on NVIDIA H200, 2 processes",
        "step 20/40  loss 1.5000  16.0 crops/s  MFU 42%  ETA 0:00:10",
        "step 21 skipped: loss or gradient not finite; its clips are in the log",
        "shards/00001.i16: cut short (other clips take the place of those in it)",
        "warning at step 23: collapsing",
        "probe at step 24: student knn 50.0%, teacher linear 25.0%",
    ]


def test_a_run_with_other_options_is_refused_in_one_line(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(corpus, "--out", out, "--steps", 2, *SMALL) == 0
    capsys.readouterr()
    assert run(corpus, "--out", out, "--steps", 3, "--preset", "small") == cli.FAILED
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "holds another run" in said
    assert "train.steps is 2 there and 3 here" in said
    assert "model.width is 192 there and 384 here" in said
    assert "To go on with it, leave out --preset, --steps." in said
    assert run(corpus, "--out", out, "--steps", 3, "--preset", "small", "--dry-run") == cli.FAILED
    assert capsys.readouterr() == ("", f"{said}\n")


def test_a_dry_run_refuses_what_the_run_would(corpus, tmp_path, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    assert run(corpus, "--out", tmp_path / "run", "--steps", 2, *SMALL, "--dry-run") == cli.FAILED
    assert "batch_size is 2, which 3 processes times" in capsys.readouterr().err


def test_a_run_on_a_corpus_that_has_grown_is_refused_with_the_way_on(corpus, tmp_path, capsys):
    audio, grown, out = tmp_path / "audio", tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(Path(corpus).parent / "audio", audio)
    prepare(audio, grown)
    assert run(grown, "--out", out, "--steps", 2, *SMALL) == 0
    soundfile.write(audio / "new.wav", np.random.default_rng(1).uniform(-0.5, 0.5, 9_000), 16_000)
    prepare(audio, grown)
    capsys.readouterr()
    assert run(grown, "--out", out, "--device", "cpu") == cli.FAILED
    assert capsys.readouterr().err == (
        f"matpac-fast pretrain: {out} holds another run: its corpus is another one, or has grown or changed since, "
        "of 5 clips there and 6 here. "
        f"To go on with its weights on this corpus, add --init {out} and give a new folder to --out\n"
    )
    options = [word for word in SMALL if word not in ("--preset", "tiny")]
    assert run(grown, "--out", tmp_path / "new", "--steps", 2, *options, "--init", out) == 0


@pytest.fixture
def in_a_terminal():
    """Whatever nohup may have said of SIGHUP to the tests."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_sigterm_and_a_closed_terminal_save_and_say_so(corpus, tmp_path, capsys, number):
    out = tmp_path / "run"
    before = signal.getsignal(number)

    def interrupt():
        while not any("loss" in record for record in read_log(out / "log.jsonl")):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run(corpus, "--out", out, "--steps", 500, *SMALL) == 128 + number
    said = capsys.readouterr().out
    assert "saving after this step" in said
    step = int((out / "latest").read_text().removeprefix("step-"))
    assert 2 <= step < 500
    assert f"stopped at step {step} of 500" in said
    assert signal.getsignal(number) is before

    assert read_log(out / "log.jsonl")[-1] == {"event": "stopped", "step": step}


def test_dry_run_trains_nothing(corpus, tmp_path, capsys):
    assert run(corpus, "--out", tmp_path / "run", "--steps", 8, *SMALL, "--dry-run") == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["trained parameters"].strip() == "7.6 M"
    assert rows["steps"].strip() == "8, 2.0 an epoch"
    assert "GFLOP a crop" in rows["work"]
    # Weights, gradients and two moments of what is trained, weights of the teachers: float32, in MiB of millions.
    trained, averaged = (float(rows[name].split()[0]) for name in ("trained parameters", "teachers' parameters"))
    fixed = 4 * (4 * trained + averaged) / 1.048576
    assert int(rows["weights, gradients, Adam"].split()[0]) == pytest.approx(fixed, abs=2)
    assert int(rows["checkpoint"].split()[0]) == pytest.approx(fixed - 4 * trained / 1.048576, abs=2)  # no gradients
    assert rows["activations"].endswith("MiB a crop, 2 at a time")
    total, *parts = (
        int(rows[name].strip().removeprefix("about ").split()[0])
        for name in ("memory", "weights, gradients, Adam", "activations")
    )
    assert abs(total - sum(parts)) <= 1
    assert f"crops/s in {AUTO} on cpu" in rows["speed"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--crop-seconds", "6"], "--crop-seconds 6: expected a multiple of 0.16 s, such as 5.92 or 6.08"),
        (["--crop-seconds", "0.1"], "expected a multiple of 0.16 s, such as 0.16"),
        (["--crop-seconds", "6.08"], "no clip is as long as a crop, 97520 samples; the longest of 5 has 12800"),
        (["--crop-seconds", "6.08"], "by pretrain's --pad-short repeat or --pad-short zeros"),
        (["--crop-seconds"], "--crop-seconds: expected one length or more, such as 6.08"),
        (["--crop-seconds", "nan"], "--crop-seconds nan: expected a multiple of 0.16 s"),
        (["--lr", "inf"], "lr is inf; expected a positive number"),
        (["--steps", "0"], "steps is 0; expected at least 1"),
        (["--device", "cuda:99"], "device is 'cuda:99'; torch finds"),
        (["--device", "gpu"], "device is 'gpu'; expected auto, cpu, cuda or cuda:N"),
        (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--init", "matpac-nano"], "matpac-nano: an encoder alone; expected a training checkpoint"),
        (["--init", PACKAGED["matpac-nano"]], "nano.safetensors: an encoder alone; expected a training checkpoint"),
        (["--mcl-heads", "-1"], "mcl_heads is -1; expected 0 or more"),
        (["--ema", "0.99", "1.5"], "ema_end is 1.5; expected 0 to 1"),
        (["--set", "model.student_temp=-1"], "student_temp is -1.0; expected a positive temperature"),
        (["--set", "train.betas=[0.9]"], "betas is (0.9,); expected two numbers"),
        (["--set", "model.center_of=5"], "center_of is '5'; expected 'probabilities' or 'logits'"),
        (["--set", "model.patch_size=0"], "patch_size is 0; expected at least 1"),
        (["--set", "model.student_tmp=1"], "there is no field 'model.student_tmp'; did you mean model.student_temp?"),
        (["--set", "train.log_every=2"], "train.log_every is given by --log-every and by --set; leave one out"),
        (["--set", "model.n_frames=64"], "model.n_frames is given by --crop-seconds and by --set; leave one out"),
        (["--ema", "0.9", "1", "--set", "model.ema_end=0.9"], "model.ema_end is given by --ema and by --set"),
    ],
)
def test_what_cannot_be_is_one_line(corpus, tmp_path, capsys, options, says):
    assert run(corpus, "--out", tmp_path / "run", "--steps", 1, *SMALL, *options) == cli.FAILED
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1


def test_no_corpus_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "nowhere", "--out", tmp_path / "run") == cli.FAILED
    assert "no corpus" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_crop_lengths_mcl_and_decays(corpus, tmp_path):
    options = [*SMALL, "--steps", 4, "--pad-short", "repeat", "--mcl-heads", 2, "--ema", "0.99", "0.999"]
    at = options.index("--crop-seconds")
    options[at : at + 2] = ["--crop-seconds", "0.16", "0.48"]
    assert run(corpus, "--out", tmp_path / "run", *options) == 0
    config = read_log(tmp_path / "run" / "log.jsonl")[0]["config"]
    assert config["train"]["crop_frames"] == [16, 48]
    assert config["model"]["n_frames"] == 48
    assert config["model"]["mcl_heads"] == 2
    assert [config["model"][name] for name in ("ema_start", "ema_end", "head_ema_start")] == [0.99, 0.999, 0.99]
    assert run(corpus, "--out", tmp_path / "run", "--device", "cpu") == 0


def test_every_option_reaches_the_run(corpus, tmp_path, monkeypatch):
    asked = []

    def pretrained(clips, out, model, train, *_):
        asked.append((model, train))
        return Result(out, train.steps, True)

    monkeypatch.setattr("matpac_fast.train.loop.pretrain", pretrained)
    model = {"mask_ratio": 0.5, "mcl_heads": 2, "teacher_init": "copy", "center_of": "logits"}
    train = {"steps": 40, "batch_size": 6, "grad_accumulation": 3, "lr": 0.002, "warmup": 5, "pad_short": "zeros"}
    train |= {"precision": "bf16", "seed": 9, "log_every": 7, "save_every": 8, "keep_last": 2, "keep_every": 16}
    train |= {"probe_every": 24}
    words = [word for name, value in (model | train).items() for word in ("--" + name.replace("_", "-"), value)]
    switches = ["--no-stretch-decays", "--compile", "--no-cuda-graph", "--shard"]
    assert run(corpus, "--out", tmp_path / "run", "--preset", "nano", "--device", "cpu", *words, *switches) == 0
    [(given_model, given_train)] = asked
    assert given_model.to_dict().items() >= model.items()
    train |= {"stretch_decays": False, "compile": True, "cuda_graph": False, "shard": True}
    assert given_train.to_dict().items() >= train.items()


def test_a_run_from_other_weights_is_as_large_as_they_are(corpus, tmp_path):
    options = [*SMALL, "--preset", "nano", "--mcl-heads", 2, "--steps", 2]
    assert run(corpus, "--out", tmp_path / "a", *options) == 0
    short = ["--crop-seconds", "0.16", "--batch-size", 2, "--device", "cpu", "--steps", 1]
    assert run(corpus, "--out", tmp_path / "b", "--init", tmp_path / "a", *short) == 0
    a, b = (read_log(tmp_path / name / "log.jsonl")[0]["config"]["model"] for name in "ab")
    assert {name for name in a if a[name] != b[name]} <= {"n_frames", "max_steps", "mcl_temp_decay"}
    assert b["mcl_heads"] == 2
    # As large as an official one, too, which does not say the heads of a predictor that is none of the official width.
    torch.save({"model": Matpac(MatpacConfig.from_dict(a)).official_state_dict()}, tmp_path / "official.pt")
    theirs = ["--init", tmp_path / "official.pt", *short, "--dry-run"]
    assert run(corpus, "--out", tmp_path / "c", *theirs, "--set", "model.predictor_heads=4") == 0
    assert run(corpus, "--out", tmp_path / "c", *theirs, "--preset", "nano") == 0
    assert run(corpus, "--out", tmp_path / "c", *theirs) == 2


def test_a_run_from_other_weights_has_their_mels_with_a_preset_too(corpus, tmp_path):
    Matpac(MatpacConfig.preset("nano", n_mels=128, n_frames=32, mcl_heads=2)).save(tmp_path / "weights")
    for name, options in (("a", []), ("b", ["--preset", "nano"])):
        small = [*options, "--crop-seconds", "0.16", "--batch-size", 2, "--device", "cpu", "--steps", 1]
        assert run(corpus, "--out", tmp_path / name, "--init", tmp_path / "weights", *small) == 0
        config = load_encoder(tmp_path / name).sizes
        assert (config["n_mels"], config["width"]) == (128, 192)


def test_a_model_of_another_front_end_on_a_corpus_of_its_rate(corpus, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", rng.uniform(-0.5, 0.5, 24_000), 32_000)
    prepare(tmp_path / "audio", tmp_path / "corpus", sample_rate=32_000)
    Matpac(MatpacConfig.preset("nano", sample_rate=32_000, n_fft=1024, hop=400)).save(tmp_path / "weights")
    options = ["--out", tmp_path / "run", "--batch-size", 2, "--device", "cpu", "--steps", 1]
    theirs = ["--init", tmp_path / "weights", *options]
    assert run(corpus, *theirs, "--crop-seconds", "0.2") == cli.FAILED
    assert "at 16000 Hz; expected 32000 Hz" in capsys.readouterr().err
    assert run(tmp_path / "corpus", *options, "--preset", "nano") == cli.FAILED
    assert "at 32000 Hz; expected 16000 Hz" in capsys.readouterr().err
    assert run(tmp_path / "corpus", *theirs, "--crop-seconds", "0.32") == cli.FAILED
    assert "--crop-seconds 0.32: expected a multiple of 0.2 s, such as 0.2 or 0.4" in capsys.readouterr().err
    assert run(tmp_path / "corpus", *theirs, "--crop-seconds", "0.4", "--dry-run") == 0
    assert run(tmp_path / "corpus", *theirs, "--crop-seconds", "0.4") == 0
    assert load_encoder(tmp_path / "run").native_seconds == 0.4
    capsys.readouterr()
    told = "warning: model.sample_rate is 32000, and windows of 400 samples every 160"
    rate = [
        "--dry-run",
        "--out",
        tmp_path / "new",
        *options[2:],
        "--preset",
        "nano",
        "--set",
        "model.sample_rate=32000",
    ]
    for more, warned in (([], True), (["model.hop=320"], False)):
        assert run(tmp_path / "corpus", *rate, *more, "--crop-seconds", "0.32") == 0
        assert (told in capsys.readouterr().err) == warned


def test_the_bar_shows_loss_and_speed(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(corpus, "--out", tmp_path / "run", "--steps", 2, *SMALL) == 0
    said = capsys.readouterr().out
    assert "2/2" in said
    assert "crops/s" in said
    assert "loss" in said


def test_training_goes_on_when_nobody_reads_its_output_any_more(corpus, tmp_path):
    command = [sys.executable, "-m", "matpac_fast.cli", "pretrain", corpus, "--out", str(tmp_path / "run")]
    options = [*SMALL[:-1], "1", "--steps", "8"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    place = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    with subprocess.Popen([*command, *options], **pipes, **place) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("starting")
        process.stdout.close()  # as `| head -1` does
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
    assert read_log(tmp_path / "run" / "log.jsonl")[-1] == {"event": "finished", "step": 8}


def test_what_nohup_ignores_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pretrain_command._Signals(print):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_a_folder_that_cannot_be_that_of_a_run_is_said_before_anything(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, says in (
        ("file", "file: a file, where a folder for the run was expected"),
        ("link", "link: a link to nothing, where a folder for the run was expected"),
        (os.fsdecode(b"\xff"), "weights are not read from where a name is not UTF-8; rename it"),
    ):
        assert run(corpus, "--out", tmp_path / name, "--steps", 1, *SMALL) == cli.FAILED
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_weights_to_begin_with_that_are_a_pipe_are_not_waited_for(corpus, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert run(corpus, "--out", tmp_path / "run", "--init", tmp_path / "pipe") == cli.FAILED
    assert "pipe: not a regular file; expected a file of weights or a run folder" in capsys.readouterr().err
