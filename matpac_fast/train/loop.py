"""The training loop, on the CPU or one GPU."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from ..audio.corpus import Corpus
from ..config import MatpacConfig
from ..errors import ConfigError
from ..model import Matpac
from ..reference import LogMelConfig
from .config import TrainConfig, resolve_precision
from .feed import Batch, Feed
from .flops import peak_flops, step_flops
from .logs import Log, Record, Reporter, versions
from .sampler import Sampler
from .schedule import learning_rate
from .state import RunFolder, Saver, Snapshot, describe, differences, load_weights, read_config
from .step import Step, make_optimizer, train_step
from .watch import BadSteps, TrainingError, collapse


@dataclass(frozen=True)
class Result:
    """How a call of `pretrain` ended."""

    folder: Path
    step: int  # steps done
    finished: bool  # False where `stop` ended it early: call `pretrain` again to go on


def pretrain(
    corpus: Corpus,
    out: str | os.PathLike[str],
    model_config: MatpacConfig,
    config: TrainConfig,
    device: str | torch.device = "auto",
    init: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train a Matpac on `corpus` into the run folder `out`, or go on with the run that is there.

    The same arguments give the same batches, and on one CPU the same weights bit for bit, however often the run was
    interrupted; a GPU's attention may add up in another order each time.

    Args:
        corpus: what `prepare` wrote.
        out: the run folder (see state.py), gone on with from its newest checkpoint.
        model_config: the model, its schedules used as they stand (`fit_to_run` stretches the official ones to a run).
        config: the training.
        device: "auto" is the GPU where there is one, else the CPU.
        init: weights that a new run starts from: a run folder, a file of ours, or an official training checkpoint.
        reporter: hears of every step and every line of the log.
        stop: asked after every step; True saves and returns.

    Raises:
        ConfigError: `out` holds another run (the message lists what differs), or no clip is long enough.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: too many steps in a row were not finite, or a batch does not fit into memory.
    """
    reporter = reporter or Reporter()
    device = pick_device(device)
    mel = LogMelConfig()
    if corpus.sample_rate != mel.sample_rate:
        raise ConfigError(f"the corpus is at {corpus.sample_rate} Hz; expected {mel.sample_rate} Hz: prepare it again")
    crops = [mel.n_samples(n) for n in config.crop_frames or (model_config.n_frames,)]
    sampler = Sampler(corpus.frames, crops, config.batch_size, config.seed, config.pad_short)
    model = Matpac(model_config)
    folder = RunFolder(out)
    with folder.locked():
        stored = read_config(folder.path)
        if config.precision == "auto":
            chosen = stored["train"]["precision"] if stored else resolve_precision("auto", device)
            config = dataclasses.replace(config, precision=chosen)
        asked = describe(model_config, config, corpus, init)
        if stored and (different := differences(stored, asked)):
            raise ConfigError(f"{folder.path} holds another run: {'; '.join(different)}; give a new folder to --out")
        if init is not None and folder.latest() is None:
            load_weights(model, init)
        if stored is None:
            folder.write_config(asked)
        model.to(device).train()
        run = _Run(folder, model, config, corpus, sampler, device, reporter)
        try:
            return run.go(stop)
        finally:
            run.close()


class _Run:
    """A run from wherever its folder stands to its end or to a stop."""

    def __init__(
        self,
        folder: RunFolder,
        model: Matpac,
        config: TrainConfig,
        corpus: Corpus,
        sampler: Sampler,
        device: torch.device,
        reporter: Reporter,
    ):
        self.folder, self.model, self.config, self.corpus = folder, model, config, corpus
        self.sampler, self.device, self.reporter = sampler, device, reporter
        self.optimizer = make_optimizer(model, config)
        state = folder.load(model, self.optimizer)
        self.done: int = state["step"] if state else 0  # steps
        self.unreadable: set[str] = set()
        self.collapsed = False
        self.saved: int | None = self.done if state else None
        self.began = time.perf_counter() - (state["seconds"] if state else 0.0)
        self.bad = BadSteps(config.log_every, config.max_bad_steps, device)
        self.peak = peak_flops(device, config.precision)
        self.log = Log(folder.log, keep_until=self.done)
        self.saver = Saver(folder, config.keep_last, config.keep_every)
        self.feed = Feed(corpus, sampler, device, self.done, config.steps)

    def close(self) -> None:
        self.feed.close()
        self.saver.close()
        self.log.close()

    def go(self, stop: Callable[[], bool]) -> Result:
        c = self.config
        if self.done == c.steps:
            return Result(self.folder.path, self.done, finished=True)
        self.tell(self.header())
        since, clock, waited = self.done, time.perf_counter(), 0.0
        for batch in self.feed:
            for text in batch.unreadable:
                if text not in self.unreadable:  # a broken shard is met again and again
                    self.unreadable.add(text)
                    self.tell({"event": "unreadable", "step": self.done, "text": text})
            logging = (self.done + 1) % c.log_every == 0 or self.done + 1 == c.steps
            measured = self.step(batch, statistics=logging)
            self.bad.add(batch.plan, measured.bad)
            self.done += 1
            if logging or self.device.type == "cpu":  # on a GPU the host would have to wait for the answer
                self.check_bad()
            if logging:
                values = self.fetch(measured)
                seconds = time.perf_counter() - clock
                values |= self.rates(batch.plan.crop, (self.done - since) / seconds)
                values["data_wait"] = (self.feed.waited - waited) / seconds
                self.tell(values)
                self.warn_of_collapse(values)
                since, clock, waited = self.done, time.perf_counter(), self.feed.waited
            self.reporter.step(self.done)
            self.saver.check()
            if stop():
                break
            if self.done % c.save_every == 0:
                clock += self.save()
        self.check_bad()
        self.save()
        self.saver.wait()
        finished = self.done == c.steps
        self.tell({"event": "finished" if finished else "stopped", "step": self.done})
        return Result(self.folder.path, self.done, finished)

    def step(self, batch: Batch, statistics: bool) -> Step:
        measured = self.try_step(batch, self.config.grad_accumulation, statistics)
        if measured is None:
            raise TrainingError(self.out_of_memory(batch))
        return measured

    def try_step(self, batch: Batch, n: int, statistics: bool) -> Step | None:
        """Train on a batch in `n` pieces; None where a piece does not fit into memory."""
        c, model, step = self.config, self.model.config, batch.plan.step
        try:
            spec = ops.log_mel(batch.wave, LogMelConfig(n_mels=model.n_mels))  # (B, n_mels, T)
            n_tokens = model.freq * (spec.shape[2] // model.patch_size)
            ids_shuffle = ops.mask_shuffle(c.seed, step, batch.index, n_tokens)  # (B, N)
            pieces = list(zip(spec.chunk(n), ids_shuffle.chunk(n), strict=True))
            lr = learning_rate(step, c.lr, c.warmup_steps, c.steps)
            return train_step(self.model, self.optimizer, pieces, step, lr, c.clip_norm, c.precision, statistics)
        except torch.OutOfMemoryError:
            return None

    def out_of_memory(self, batch: Batch) -> str:
        """What to do about a batch that does not fit, found by trying: the run is over, its weights may be spoilt."""
        rows, n = len(batch.wave), self.config.grad_accumulation
        message = f"{rows // n} crops at a time do not fit into the memory of {self.device}"
        for more in (n * 2**i for i in range(1, rows.bit_length())):
            self.optimizer.zero_grad(set_to_none=True)
            if rows % more == 0 and self.try_step(batch, more, statistics=False) is not None:
                return f"{message}, but {rows // more} do: --grad-accumulation {more} computes the same step"
        return f"{message}, nor do fewer: choose a smaller preset or a shorter crop"

    def check_bad(self) -> None:
        for plan in self.bad.read():
            clips = [self.corpus.name(int(clip)) for clip in plan.clips]
            text = "loss or gradient not finite"
            self.tell({"event": "skipped", "step": plan.step + 1, "text": text, "clips": clips})
        if self.bad.limit_reached:
            raise TrainingError(
                f"stopped at step {self.done}: loss or gradient not finite for {self.config.max_bad_steps} steps "
                f"in a row; their clips are listed in {self.folder.log}. Try a lower learning rate"
            )

    def warn_of_collapse(self, values: Record) -> None:
        """Once when it begins, not on every line while it lasts."""
        text = collapse(values, self.model.config.width)
        if text and not self.collapsed:
            self.tell({"event": "warning", "step": self.done, "text": text})
        self.collapsed = text is not None

    def fetch(self, measured: Step) -> Record:
        """The log's numbers of this step, in one transfer."""
        tensors = {name: getattr(measured, name) for name in ("loss", "loss_pred", "loss_cls", "grad_norm")}
        tensors |= measured.statistics or {}
        numbers = torch.stack([value.float() for value in tensors.values()]).tolist()
        lr = learning_rate(self.done - 1, self.config.lr, self.config.warmup_steps, self.config.steps)
        return {"step": self.done, **dict(zip(tensors, numbers, strict=True)), "lr": lr}

    def rates(self, crop: int, steps_per_second: float) -> Record:
        """How far and how fast it goes; `mfu` is the share of the device's matrix peak, where that is known."""
        crops = steps_per_second * self.config.batch_size
        record = {"epoch": self.sampler.epoch(self.done), "crops_per_s": crops}
        if self.peak:
            n_frames = LogMelConfig().n_frames(crop)
            record["mfu"] = crops * step_flops(self.model.config, n_frames) / self.peak
        return record

    def header(self) -> Record:
        """The first line of the log, and one more each time the run is gone on with: what is run, by what, on what."""
        return {
            "event": "resume" if self.done else "start",
            "step": self.done,
            "config": read_config(self.folder.path),
            "versions": versions(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "clips": len(self.sampler),
            "clips_left_out": self.sampler.n_dropped,
        }

    def tell(self, record: Record) -> None:
        self.log.write(record)
        self.reporter.record(record)

    def save(self) -> float:
        """Begin a checkpoint, unless this step has one; returns the seconds that training waited."""
        start = time.perf_counter()
        if self.saved != self.done:
            state = {"step": self.done, "seconds": round(start - self.began, 3)}
            self.saver.save(Snapshot.take(self.model, self.optimizer, state))
            self.saved = self.done
        return time.perf_counter() - start


def pick_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}; torch finds {torch.cuda.device_count()} CUDA devices here")
    return found
