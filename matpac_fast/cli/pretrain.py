"""`matpac-fast pretrain`: train an encoder on a corpus, or go on with a run."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from ..config import PRESETS, MatpacConfig
from ..errors import ConfigError
from ..train.config import Precision, TrainConfig, fit_to_run
from ..train.logs import Record, Reporter, iter_log
from ..train.sampler import Short
from ._progress import unbreakable_console
from ._set import read_fields, refuse_both
from ._watching import live_probe, read_watching, reporters
from ._words import plain

_SOON = 30.0  # seconds: where the log's first line comes later than this, one estimate is said before it


def main(
    corpus: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    preset: Literal["nano", "tiny", "small", "base", "large"] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    grad_accumulation: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    stretch_decays: bool | None = None,
    ema: tuple[float, float] | None = None,
    crop_seconds: tuple[float, ...] | None = None,
    visits: tuple[int, ...] | None = None,
    pad_short: Short | None = None,
    mask_ratio: float | None = None,
    mcl_heads: int | None = None,
    teacher_init: Literal["random", "copy"] | None = None,
    center_of: Literal["probabilities", "logits"] | None = None,
    precision: Precision | None = None,
    seed: int | None = None,
    init: Path | None = None,
    device: str = "auto",
    compile: bool | None = None,
    cuda_graph: bool | None = None,
    shard: bool | None = None,
    settings: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE ..."), tyro.conf.UseAppendAction
    ] = (),
    log_every: int | None = None,
    save_every: int | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    probe_data: Path | None = None,
    probe_every: int | None = None,
    probe_clips: int | None = None,
    tensorboard: bool | None = None,
    dry_run: bool = False,
) -> int:
    """Pre-train an encoder on a corpus.

    Example: matpac-fast pretrain corpus/ --out runs/a --preset tiny --steps 2000

    The same command on the same --out goes on with the run that is there, to the bit on a CPU; options that are left
    out are then the run's own. Ctrl-C and SIGTERM save a checkpoint and leave. On several GPUs, here eight:

    torchrun --nproc-per-node 8 -m matpac_fast.cli pretrain corpus/ --out runs/a

    Args:
        corpus: folder that `matpac-fast prepare` wrote, or several, of one sample rate.
        out: folder of the run: config.json, log.jsonl, curves.png, checkpoints/.
        preset: size of the model; base (768 x 12) is the official one. Default: base.
        steps: optimiser steps; the schedules are stretched to them. Default: 294816, as official.
        batch_size: crops an optimiser step, over all processes. Default: 256 a GPU, 32 on the CPU; official: 2048.
        grad_accumulation: compute a batch in so many pieces, one after the other: less memory, the same step.
        lr: peak learning rate. Default: 3e-4.
        warmup: steps to the peak. Default: 1/15 of the run, as official.
        stretch_decays: by default a short run uses proportionally faster EMA and temperature decays.
            --no-stretch-decays uses the official decays a step, with which a short run's teacher hardly moves.
        ema: decay of the teacher's average a step, at the start and at the end of the run. Default: the official
            0.99995 0.99999, stretched.
        crop_seconds: length of a crop, a multiple of a patch's 0.16 s; of several lengths each step draws one.
            Default: 6.08.
        visits: how often an epoch visits each clip of each folder, such as 1 4. Default: once.
        pad_short: clips shorter than a crop: leave them out, repeat them, or add silence. Default: drop.
        mask_ratio: share of the patches that the student does not see. Default: 0.7.
        mcl_heads: heads of multiple choice learning; 5 is MATPAC++. Default: 0, MATPAC.
        teacher_init: start the teacher from random weights or as a copy of the student. Default: random, as official.
        center_of: centre by the teacher's probabilities or by its logits, as DINO. Default: probabilities, as official.
        precision: auto is bf16 where the device computes in it, else float32. Default: auto.
        seed: determines the initial weights, the order of the clips, the crops and the masks. Default: 0.
        init: start a new run from these weights: a run, or its checkpoint of a step, runs/a@20000, a file of
            Matpac.save, or an official training checkpoint; an encoder alone will not do. The model's sizes are theirs.
            Default: random.
        device: auto, cpu, cuda or cuda:1. Under torchrun each process of a machine takes the GPU of its own number.
        compile: run the transformer blocks through torch.compile, on a GPU in place of the package's fused blocks; it
            takes a minute or two to begin. A short run of each shows which is faster. Default: not.
        cuda_graph: launch each step as one CUDA graph. Default: where one process trains on a GPU, which alone can.
        shard: under torchrun, cut weights, gradients and Adam's moments into one part a process (FSDP2), and let
            each write its part of a checkpoint: for models that do not fit on one GPU. Default: each process holds all
            of them (DDP).
        settings: any field of the model's and the training's configuration, such as --set model.student_temp=0.07
            'train.betas=[0.9, 0.98]'; docs/training.md lists them. Values are JSON and taken as they stand; they
            override --preset. A field that has an option of its own may be given by either, not by both.
        log_every: steps between two lines of the log. Default: 20.
        save_every: steps between two checkpoints. Default: 500.
        keep_last: newest checkpoints that stay on disk. Default: 3.
        keep_every: keep those of every so many steps too, a multiple of save-every. Default: none of them.
        probe_data: a folder of audio whose sub-folders are labels: score student and teacher on it as they are trained,
            by nearest neighbours and a linear probe; "none" ends it in a run that is gone on with. Default: no scores.
        probe_every: steps between two scores. Default: those between two checkpoints.
        probe_clips: clips to score on, evenly over the labels; all are kept in memory. Default: 500.
        tensorboard: write all that is logged for TensorBoard too, into the run's folder. Default: not.
        dry_run: print the size of model and run and an estimate of the time, and train nothing.
    """
    from ..audio.corpus import Corpus
    from ..train.begin import check_run, check_sizes
    from ..train.distributed import pick_device
    from ..train.loop import pretrain
    from ..train.state import read_config, steps_done
    from ..train.weights import weights_sizes

    fields = read_fields(word for words in settings for word in words)
    target = pick_device(device)
    if not corpus:
        raise ConfigError("pretrain: expected a folder that matpac-fast prepare wrote, or several; got none")
    clips = Corpus(*corpus)
    stored = read_config(out)
    watching = read_watching(out).but(probe_data, probe_clips, tensorboard)
    first = os.environ.get("RANK", "0") == "0"
    given_model = _given(mask_ratio=mask_ratio, mcl_heads=mcl_heads, teacher_init=teacher_init, center_of=center_of)
    given_train = _given(
        steps=steps,
        batch_size=batch_size,
        grad_accumulation=grad_accumulation,
        lr=lr,
        warmup=warmup,
        stretch_decays=stretch_decays,
        visits=visits,
        pad_short=pad_short,
        precision=precision,
        seed=seed,
        log_every=log_every,
        save_every=save_every,
        keep_last=keep_last,
        keep_every=keep_every,
        probe_every=probe_every,
        compile=compile,
        cuda_graph=cuda_graph,
        shard=shard,
    )
    sizes: dict[str, Any] = {}
    if preset is not None:
        sizes = {name: getattr(MatpacConfig.preset(preset), name) for name in set().union(*PRESETS.values())}
    by_set = [f"{part}.{name}" for part, values in fields.items() for name in values]
    if init is not None and stored is None and first:  # what is gone on with says how large it is
        theirs = weights_sizes(init, sizes | fields["model"])
        check_sizes(init, theirs, sizes | given_model | fields["model"], by_set)
        sizes = theirs | sizes
    if crop_seconds is not None and first:
        if not crop_seconds:
            raise ConfigError("--crop-seconds: expected one length or more, such as 6.08")
        whole = MatpacConfig().to_dict() | (stored["model"] if stored else {}) | sizes | given_model | fields["model"]
        # Of a length that is whole patches whatever their size, as the mels are.
        grid = MatpacConfig.from_dict(whole | {"n_frames": 38 * whole["n_mels"]})
        frames = tuple(_frames(seconds, grid) for seconds in crop_seconds)
        given_model["n_frames"] = max(frames)
        given_train["crop_frames"] = frames if len(frames) > 1 else None
    if ema is not None:  # as they were given, not stretched; the head's teacher is never slower, as in `fit_to_run`
        head = min(MatpacConfig.head_ema_start, ema[0])
        given_model |= {"ema_start": ema[0], "ema_end": ema[1], "head_ema_start": head}
    refuse_both("model", given_model, fields["model"])
    refuse_both("train", given_train, fields["train"])
    given_model = sizes | given_model | fields["model"]
    given_train |= fields["train"]
    if not first:  # rank 0's count, which alone may see the run that they are meant for
        train, model = TrainConfig(), MatpacConfig()
    elif stored is None:
        defaults = {"batch_size": 256 * int(os.environ.get("WORLD_SIZE", "1")) if target.type == "cuda" else 32}
        train = TrainConfig.from_dict({**defaults, **given_train})
        model = MatpacConfig.from_dict({**fit_to_run(MatpacConfig(), train).to_dict(), **given_model})
        if "sample_rate" in fields["model"]:
            _warn_of_another_rate_s_front_end(model)
    else:
        train = TrainConfig.from_dict({**stored["train"], **given_train})
        model = MatpacConfig.from_dict({**stored["model"], **given_model})
        init = init or stored["init"]
        if by_set:  # `pretrain` checks it again, but knows nothing of --set
            check_run(out, model, train, clips, init, target, by_set=by_set)

    complete = stored is not None and first and _is_complete(out, train.steps)
    if dry_run:
        from ..train.begin import check_options
        from ..train.estimate import estimate

        if first:
            world = int(os.environ.get("WORLD_SIZE", "1"))
            check_options(clips, model, train, target, world)
            train = check_run(out, model, train, clips, init, target)
            if probe_data and watching.probe_data and not complete:
                from ..study.live import check_folder

                check_folder(watching.probe_data, watching.probe_clips)
            done = steps_done(out) if out.exists() else 0
            print(estimate(clips, model, train, target, world, done, None if done else init))
        return 0
    with _Watcher(train, quiet=not first) as watcher, _Signals(watcher.say) as signals:
        reporter = reporters(out, watching, watcher, watcher.say) if first else None
        gone = probe_data is None and watching.probe_data is not None and not os.path.isdir(watching.probe_data)
        if gone and first:
            watcher.say(f"note: this run was probed on {watching.probe_data}, which is not there: it goes on without")
        probes = first and not gone and not complete
        probe = live_probe(watching, target, model.sample_rate, watcher.say) if probes else None
        result = pretrain(clips, out, model, train, target, init, reporter, signals.caught, probe)
    if complete:
        watcher.say("nothing to do, the run was complete already" + (": nothing was probed" if probe_data else ""))
    watcher.say(f"{'finished' if result.finished else 'stopped'} at step {result.step} of {train.steps}: {out}")
    if result.finished:
        watcher.say(f"next: matpac-fast embed AUDIO --encoder {shlex.quote(str(out))} --out embeddings/")
        return 0
    watcher.say("the same command goes on from here")
    return 128 + (signals.number or signal.SIGTERM)  # where another process was asked to stop, all of them do


def _warn_of_another_rate_s_front_end(model: MatpacConfig) -> None:
    usual, names = MatpacConfig(), ("n_fft", "win_length", "hop", "f_max")
    if model.sample_rate != usual.sample_rate and all(getattr(model, name) == getattr(usual, name) for name in names):
        warnings.warn(
            f"model.sample_rate is {model.sample_rate}, and windows of {model.win_length} samples every {model.hop}, "
            f"with bands up to {model.f_max:g} Hz, are those of {usual.sample_rate}: give n_fft, win_length, hop, "
            "f_max, mean and std too (docs/training.md, another front end)",
            stacklevel=2,
        )


def _is_complete(run: Path, steps: int) -> bool:
    from ..train.state import steps_done

    return steps_done(run) == steps and any(record.get("event") == "finished" for record in iter_log(run / "log.jsonl"))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _frames(seconds: float, model: MatpacConfig = MatpacConfig()) -> int:
    patch, rate = model.patch_size, model.sample_rate / model.hop  # of frames, in Hz
    frames = round(rate * seconds) if math.isfinite(seconds) else 0
    if frames < patch or frames % patch:
        below = max(0, frames // patch * patch)
        near = " or ".join(f"{n / rate:g}" for n in (below, below + patch) if n)
        raise ConfigError(f"--crop-seconds {seconds:g}: expected a multiple of {patch / rate:g} s, such as {near}")
    return frames


class _Signals:
    """Turns the first Ctrl-C, SIGTERM or closing of the terminal into a wish to stop after this step; a second one ends
    the process at once.

    A second one within a second is not a second wish: torchrun passes on the Ctrl-C that the terminal has sent already.
    """

    def __init__(self, say: Callable[[str], None]):
        self.number: int | None = None
        self._caught, self._said = 0.0, False
        self._say = say

    def __enter__(self) -> _Signals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._catch) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def caught(self) -> bool:
        """Asked after each step. It is said here, for a handler that prints may do so in the midst of another print."""
        if self.number is not None and not self._said:
            self._said = True
            self._say("saving after this step; once more to leave without")
        return self.number is not None

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._caught > 1:
                raise KeyboardInterrupt
            return
        self.number, self._caught = number, time.monotonic()


class _Watcher(Reporter):
    """A progress bar, or plain lines where there is no terminal. Nobody need read them: training goes on unheard."""

    def __init__(self, train: TrainConfig, quiet: bool = False):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._train = train
        self._console = unbreakable_console(quiet)
        self._bar = None
        self._clock: float | None = None  # when the first step began, until it is done
        if self._console.is_terminal and not quiet:
            shown = TextColumn("{task.fields[shown]}")
            columns = (BarColumn(), MofNCompleteColumn(), shown, TimeRemainingColumn(elapsed_when_finished=True))
            self._bar = Progress(*columns, console=self._console)

    def __enter__(self) -> _Watcher:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._train.steps, shown="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed
            self._console.print(plain(text), markup=False, soft_wrap=True)

    def step(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)
        if self._clock is not None:
            self._say_estimate(step, time.monotonic() - self._clock)
            self._clock = None

    def _say_estimate(self, step: int, seconds: float) -> None:
        """After the first step, where steps are slow: what was begun by mistake should not take an hour to be seen."""
        left = self._train.steps - step
        if left and seconds * self._train.log_every > _SOON:
            self.say(
                f"the first step took {seconds:.1f} s: about {timedelta(seconds=round(left * seconds))} for the {left} "
                "that are left; a smaller --preset or fewer --steps, in a new folder, take less"
            )

    def record(self, record: Record) -> None:
        if "event" in record:
            # On a GPU the first step compiles and nobody waits for it: its time would tell nothing.
            on_cpu = record.get("device") == "cpu" or self._clock is not None
            self._clock = time.monotonic() if on_cpu else None
            if self._bar and record["event"] == "resume":  # what was done before tells nothing about the speed
                self._bar.reset(self._task, completed=record["step"])
            if text := _event(record):
                self.say(text)
            return
        shown = f"loss {record['loss']:.4f}  {record['crops_per_s']:.1f} crops/s"
        if "mfu" in record:
            shown += f"  MFU {record['mfu']:.0%}"
        if self._bar:
            self._bar.update(self._task, shown=shown)
        else:
            left = (self._train.steps - record["step"]) * self._train.batch_size / record["crops_per_s"]
            self.say(f"step {record['step']}/{self._train.steps}  {shown}  ETA {timedelta(seconds=round(left))}")


def _event(record: Record) -> str | None:
    if record["event"] in ("start", "resume"):
        config = record["config"]["train"]
        left_out = f" ({record['clips_left_out']} shorter than a crop are left out)" if record["clips_left_out"] else ""
        begun = f"going on after step {record['step']}" if record["event"] == "resume" else "starting"
        return (
            f"{begun}: {record['parameters'] / 1e6:.1f} M trained parameters, {record['clips']} clips{left_out}, "
            f"{config['batch_size']} crops a step, {config['precision']} on {record['device']}"
            + (f", {record['ranks']} processes" if record["ranks"] > 1 else "")
        )
    if record["event"] == "probe":
        scores = [f"{side}_{score}" for side in ("student", "teacher", "statistics") for score in ("knn", "linear")]
        shown = ", ".join(f"{name.replace('_', ' ')} {float(record[name]):.1%}" for name in scores if name in record)
        return f"probe at step {record['step']}: {shown}"
    if record["event"] == "skipped":
        return f"step {record['step']} skipped: {record['text']}; its clips are in the log"
    if record["event"] == "unreadable":
        return f"{record['text']} (other clips take the place of those in it)"
    if record["event"] == "warning":
        return f"warning at step {record['step']}: {record['text']}"
    return None  # how it ended is said by `main`
