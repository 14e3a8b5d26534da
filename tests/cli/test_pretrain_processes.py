"""Pre-training from the command line by several processes, and under signals that come at any time."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matpac_fast import cli
from matpac_fast.cli import pretrain as pretrain_command
from matpac_fast.train import Result, TrainConfig, read_log
from tests.cli.test_pretrain import AUTO, SMALL, run


def test_torchrun_trains_on_two_processes_and_one_of_them_speaks(corpus, tmp_path):
    """The command of the documentation, word for word but for the GPUs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "matpac_fast.cli", "pretrain", corpus, "--out", str(tmp_path / "run"), "--steps", "4"]
    ended = subprocess.run(
        [*command, *SMALL],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if "[Gloo]" not in line]  # which torch 2.8 says there too
    assert said[0].endswith(f"2 crops a step, {AUTO} on cpu, 2 processes")
    assert [line.split("  ")[0] for line in said[1:]][:2] == ["step 2/4", "step 4/4"]
    assert sum(line.startswith("finished at step 4 of 4") for line in said) == 1
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["ranks"] == 2


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux, whose /proc tells which process is which rank"
)
def test_torchrun_starts_anew_what_was_killed_and_the_run_goes_on(corpus, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "--max-restarts", "1", "-m", "matpac_fast.cli", "pretrain", corpus]
    options = ["--out", str(tmp_path / "run"), "--steps", "40", *SMALL, "--save-every", "4"]
    place = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, **place) as started:
        children, until = Path(f"/proc/{started.pid}/task/{started.pid}/children"), time.monotonic() + 60
        while not (tmp_path / "run" / "latest").exists() and time.monotonic() < until:
            time.sleep(0.02)
        ranks = [int(pid) for pid in children.read_text().split() if b"\0RANK=1\0" in environment(pid)]
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        _, said = started.communicate(timeout=120)
    assert len(ranks) == 1
    assert started.returncode == 0, said
    told = [record["event"] for record in read_log(tmp_path / "run" / "log.jsonl") if "event" in record]
    assert [event for event in told if event not in ("failed", "stopped", "warning")] == ["start", "resume", "finished"]


def environment(pid):
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()


def test_a_process_that_fails_says_which_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    told: list[str] = []
    monkeypatch.setattr("matpac_fast.train.joining.leave_word", told.append)
    assert run(tmp_path / "nowhere", "--out", tmp_path / "run") == cli.FAILED
    assert capsys.readouterr().err.startswith(f"matpac-fast pretrain (rank 1): {tmp_path}/nowhere: no corpus")
    assert cli.main(["embed", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == cli.FAILED
    assert capsys.readouterr().err.startswith("matpac-fast embed (rank 1): ")
    assert [reason.split(":")[0] for reason in told] == [f"{tmp_path}/nowhere"]  # who embeds waits for nobody

    def corpus(path):
        raise ValueError("of a sudden")

    monkeypatch.setattr("matpac_fast.audio.corpus.Corpus", corpus)
    with pytest.raises(ValueError, match="of a sudden"):
        run(tmp_path / "nowhere", "--out", tmp_path / "run")
    assert told[1:] == ["of a sudden"]


def test_a_process_that_does_not_see_the_run_leaves_the_options_to_rank_0(corpus, tmp_path, monkeypatch):
    """On a second node, whose disk holds no run: what goes with the run's own options is not held against defaults."""
    trained = []
    monkeypatch.setattr(
        "matpac_fast.train.loop.pretrain", lambda *args: trained.append(args) or Result(args[1], 3, True)
    )
    monkeypatch.setenv("RANK", "1")
    assert run(corpus, "--out", tmp_path / "run", "--grad-accumulation", 3, "--keep-every", 3) == 0
    assert len(trained) == 1


def test_the_ctrl_c_that_torchrun_passes_on_is_no_second_one(capsys):
    with pretrain_command._Signals(lambda text: None) as signals:
        signals._catch(signal.SIGINT, None)
        signals._catch(signal.SIGINT, None)
        assert signals.caught()
        signals._caught -= 2
        with pytest.raises(KeyboardInterrupt):
            signals._catch(signal.SIGINT, None)
    assert capsys.readouterr().out == ""


def test_a_signal_in_the_midst_of_a_print_is_said_after_it(monkeypatch):
    class Output(io.RawIOBase):
        written, signals = b"", [signal.SIGTERM]

        def writable(self):
            return True

        def write(self, data):
            while self.signals:  # as one that comes while nobody reads from a pipe that is full
                os.kill(os.getpid(), self.signals.pop())
            self.written += bytes(data)
            return len(data)

    output = Output()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(output), "utf-8"))
    watcher = pretrain_command._Watcher(TrainConfig(steps=1))
    with pretrain_command._Signals(watcher.say) as signals:
        watcher.say("step 1")
        assert signals.number == signal.SIGTERM
        assert signals.caught()
        assert signals.caught()
    assert output.written.decode().splitlines() == ["step 1", "saving after this step; once more to leave without"]
