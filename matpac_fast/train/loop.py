"""The training loop, on the CPU, one GPU or many."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import ops
from ..audio.corpus import Corpus
from ..backend import versions
from ..config import MatpacConfig
from ..model import Matpac
from ..oom import is_out_of_memory
from ..spans import span
from .begin import begin, make_sampler, name_transform
from .compiled import blocks, compile_blocks
from .config import TrainConfig
from .distributed import Ranks, Votes, distribute
from .feed import Batch, Feed
from .flops import peak_flops, step_flops
from .graph import GraphedStep
from .joining import join
from .journal import Journal
from .logs import Log, Record, Reporter, Reporters, iter_log
from .memory import freed_memory_kept
from .oom import advice
from .probing import Probe, ask
from .sampler import Sampler
from .schedule import learning_rate
from .state import RunFolder, Saver, Snapshot, read_config
from .step import Step, make_optimizer, train_step
from .transform import Transform
from .watch import BadSteps, TrainingError


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
    probe: Probe | None = None,
    transform: Transform | None = None,
) -> Result:
    """Train a Matpac on `corpus` into the run folder `out`, or go on with the run that is there.

    The same arguments give the same batches, and on one CPU the same weights bit for bit, however often the run was
    interrupted; a GPU's attention may add up in another order each time.

    Started by torchrun, or where torch.distributed has been initialised, all processes train one model and share each
    batch; they may be more or fewer than those that began the run. Rank 0 alone touches `out`, unless `config.shard`
    has each write a part of the checkpoints; every rank needs the same corpus.

    Args:
        corpus: what `prepare` wrote.
        out: the run folder (see state.py), gone on with from its newest checkpoint.
        model_config: the model, its schedules used as they stand (`fit_to_run` stretches the official ones to a run).
        config: the training.
        device: "auto" is the GPU where there is one, else the CPU.
        init: weights that a new run starts from: a run folder, "RUN@STEP", a file of `Matpac.save`, or an official
            training checkpoint.
        reporter: on rank 0 hears of every step and every line of the log. Where it fails, training goes on, and the
            first time is warned of, in the log too.
        stop: asked after every step; True on any rank saves and returns on all, a step later where they are several.
        probe: called on rank 0 every `config.probe_every` steps, while the others wait, with a copy of the encoders'
            weights; its numbers go into the log.
        transform: changes each batch of crops on the CPU, such as by a random gain (see `Transform`); the same on every
            rank. A run is gone on with by a transform of the same name; what the probe sees is not transformed.

    Raises:
        ConfigError: `out` holds another run (the message lists what differs), no clip is long enough, or the ranks do
            not divide the batch or have different transforms.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: too many steps in a row were not finite, a batch does not fit into memory, or the transform
            failed.
        PeerError: another rank has failed; its reason.
    """
    with join(device) as ranks, contextlib.ExitStack() as stack:
        run = begun = None

        def last_words(reason: str) -> None:
            if run is not None and not run.config.shard:  # else it may wait for the part of a rank that is gone
                run.saver.close()
            if begun is not None and ranks.first:
                _tell_failure(begun, run, reason)

        if ranks.lifeline is not None:
            ranks.lifeline.last_words = last_words
        try:
            # Rank 0's count: where the others do not see its folder, they cannot know the options of the run in it.
            model_config, config, init = ranks.from_first(lambda: (model_config, config, init))
            sampler = make_sampler(corpus, model_config, config, ranks)
            named = name_transform(transform, ranks)
            stack.enter_context(freed_memory_kept(ranks.device))
            with torch.device("cpu"):  # whichever is the application's default, as its random numbers
                model = Matpac(model_config)
            folder = ranks.from_first(lambda: RunFolder(out))
            ranks.from_first(lambda: stack.enter_context(folder.locked()))
            config, initialised = ranks.from_first(
                lambda: begin(folder, model, config, corpus, init, ranks.device, named)
            )
            begun = folder
            if config.shard and ranks.world > 1:
                folder.check_shared(ranks)
            else:  # FSDP moves the model part by part, so that no device ever holds all of it
                model.to(ranks.device)
            model.train()
            if initialised:
                ranks.hand_out(model.state_dict() if ranks.first else None, model.state_dict())
            if config.compile:
                compile_blocks(model)
            forward = distribute(model, blocks(model), ranks, config.shard)
            heard = Reporters(reporter) if reporter is not None and ranks.first else Reporters()
            run = _Run(folder, model, forward, config, corpus, sampler, ranks, heard, probe, transform)
            return run.go(stop)
        except Exception as error:
            failure = ranks.failure(error)
            last_words(str(failure))
            if failure is error:
                raise
            raise failure from error
        finally:
            if run is not None:
                run.close()


def _tell_failure(folder: RunFolder, run: _Run | None, reason: str) -> None:
    """The log's last line; what fails in telling it, log or reporter, takes not the place of the run's own error."""
    with contextlib.suppress(Exception):
        if run is not None:
            run.journal.tell({"event": "failed", "step": run.done, "text": reason})
            return
        with contextlib.closing(Log(folder.log)) as log:
            log.write({"event": "failed", "text": reason})


class _Run:
    """A run from wherever its folder stands to its end or to a stop."""

    def __init__(
        self,
        folder: RunFolder,
        model: Matpac,
        forward: nn.Module,
        config: TrainConfig,
        corpus: Corpus,
        sampler: Sampler,
        ranks: Ranks,
        reporter: Reporters,
        probe: Probe | None,
        transform: Transform | None,
    ):
        self.folder, self.model, self.forward, self.config, self.corpus = folder, model, forward, config, corpus
        self.sampler, self.ranks, self.device, self.reporter = sampler, ranks, ranks.device, reporter
        self.probe, self.probe_every = probe, config.probe_every or config.save_every
        self.probed = ranks.from_first(lambda: probe is not None)
        self.optimizer = make_optimizer(model, config)
        state = folder.load(model, self.optimizer, ranks)
        # After the load, which may put other tensors in place of the optimiser's.
        alone_on_a_gpu = ranks.world == 1 and self.device.type == "cuda"
        graphs = alone_on_a_gpu if config.cuda_graph is None else config.cuda_graph
        self.graphed = None
        if graphs:
            self.graphed = GraphedStep(
                model,
                self.optimizer,
                config.clip_norm,
                config.precision,
                if_it_fits=config.cuda_graph is None,
                lengths=len(set(sampler.crops)),
            )
        self.done: int = state["step"] if state else 0  # steps
        self.unreadable: set[str] = set()
        self.untold: list[str] = []
        self.saved: int | None = self.done if state else None
        self.began = time.perf_counter() - (state["seconds"] if state else 0.0)
        self.bad = BadSteps(config.log_every, config.max_bad_steps, self.device)
        self.peak = peak_flops(self.device, config.precision)
        mel = model.config.log_mel
        self.flops = {n: config.batch_size * step_flops(model.config, mel.n_frames(n)) for n in sampler.crops}  # a step
        log = Log(folder.log, keep_until=self.done if state else -1) if ranks.first else None
        self.journal = Journal(log, reporter, model.config, beside=self.device.type == "cuda")
        self.saver = Saver(
            folder, config.keep_last, config.keep_every, saved=lambda step: reporter.saved(folder.path, step)
        )
        self.votes = Votes(ranks, 2)
        self.feed = Feed(corpus, sampler, self.device, self.done, config.steps, transform=transform)

    def close(self) -> None:
        """The last one first, and each whatever becomes of the others."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.reporter.close)
            stack.callback(self.journal.close)
            stack.callback(self.saver.close)
            stack.callback(self.feed.close)

    def go(self, stop: Callable[[], bool]) -> Result:
        c = self.config
        if self.done == c.steps and self.ranks.from_first(self.has_finished):
            return Result(self.folder.path, self.done, finished=True)
        if self.ranks.first:
            self.journal.tell(self.header())
        if self.probed and self.done < c.steps and self.ranks.from_first(self.is_probe_due):
            self.run_probe()  # before the first step: what is to be beaten
        since, clock, waited, flops = self.done, time.perf_counter(), 0.0, 0.0
        for batch in self.feed:
            self.untold += [text for text in batch.unreadable if text not in self.unreadable]
            self.unreadable.update(batch.unreadable)  # a broken shard is met again and again
            logging = (self.done + 1) % c.log_every == 0 or self.done + 1 == c.steps
            measured = self.step(batch, statistics=logging)
            self.bad.add(batch.plan, measured.bad)
            self.done += 1
            if logging or self.device.type == "cpu":  # on a GPU the host would have to wait for the answer
                self.check_bad()
            flops += self.flops[batch.plan.crop]
            if logging:
                values = self.fetch(measured)
                seconds = time.perf_counter() - clock
                values |= self.rates((self.done - since) / seconds, flops / seconds)
                values["data_wait"] = (self.feed.waited - waited) / seconds
                self.journal.tell_measured(values, measured.gram)
                since, clock, waited, flops = self.done, time.perf_counter(), self.feed.waited, 0.0
            self.journal.settle(wait=False)
            self.reporter.step(self.done)
            self.saver.check()
            stopping, news = self.votes.cast(stop(), bool(self.untold))
            if news:
                self.tell_unreadable()
            if stopping:
                break
            if self.done % c.save_every == 0:  # first, for a probe may take longer than who wants to stop will wait
                clock += self.save()
            if self.probed and self.done % self.probe_every == 0 and self.done < c.steps:
                clock += self.run_probe()
        if self.votes.count()[1]:
            self.tell_unreadable()
        self.check_bad()
        finished = self.done == c.steps
        self.save()
        if self.probed and finished:
            self.run_probe()
        self.saver.wait()
        self.journal.tell({"event": "finished" if finished else "stopped", "step": self.done})
        self.ranks.barrier()
        return Result(self.folder.path, self.done, finished)

    def has_finished(self) -> bool:
        """Whether all was done that follows the last step, its probe too."""
        return any(record.get("event") == "finished" for record in iter_log(self.folder.log))

    def is_probe_due(self) -> bool:
        """Whether this step's probe was not made, as where the run was stopped at its checkpoint."""
        probed = (r["step"] for r in iter_log(self.folder.log) if r.get("event") == "probe")
        return self.done % self.probe_every == 0 and self.done not in probed

    def step(self, batch: Batch, statistics: bool) -> Step:
        measured = self.try_step(batch, self.config.grad_accumulation, statistics)
        if measured is None:  # the run is over, its weights may be spoilt
            fits = (lambda n: self.fits(batch, n)) if self.can_try else None
            raise TrainingError(advice(len(batch.wave), self.config.grad_accumulation, self.device, fits))
        return measured

    @property
    def can_try(self) -> bool:
        """Whether a smaller step may be tried where one had no memory. Not where there are several ranks, of which the
        others wait in the midst of the step; nor on a CPU, for malloc has taken all addresses and gives none back."""
        return self.ranks.world == 1 and self.device.type == "cuda"

    def fits(self, batch: Batch, n: int) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return self.try_step(batch, n, statistics=False) is not None
        except RuntimeError:  # more libraries want memory than the one that said so first, each in words of its own
            return False

    def try_step(self, batch: Batch, n: int, statistics: bool) -> Step | None:
        """Train on a batch in `n` pieces; None where a piece does not fit into memory."""
        c, model, step = self.config, self.model.config, batch.plan.step
        try:
            with span("front end"):
                spec = ops.log_mel(batch.wave, model.log_mel)  # (B, n_mels, T)
                n_tokens = model.freq * (spec.shape[2] // model.patch_size)
                ids_shuffle = ops.mask_shuffle(c.seed, step, batch.index, n_tokens)  # (B, N)
            pieces = list(zip(spec.chunk(n), ids_shuffle.chunk(n), strict=True))
            lr = learning_rate(step, c.lr, c.warmup_steps, c.steps)
            if self.graphed is not None:
                return self.graphed(pieces, step, lr, statistics)
            return train_step(
                self.model,
                self.optimizer,
                pieces,
                step,
                lr,
                c.clip_norm,
                c.precision,
                statistics,
                self.ranks,
                self.forward,
            )
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            raise

    def check_bad(self) -> None:
        for plan in self.bad.read():  # the same ones on every rank
            mine = [self.corpus.paths[int(clip)] for clip in plan.clips]
            clips = [name for names in self.ranks.gather(mine) for name in names]
            text = "loss or gradient not finite"
            self.journal.tell({"event": "skipped", "step": plan.step + 1, "text": text, "clips": clips})
        if self.bad.limit_reached:
            raise TrainingError(
                f"stopped at step {self.done}: loss or gradient not finite for {self.config.max_bad_steps} steps "
                f"in a row; their clips are listed in {self.folder.log}. Try a lower learning rate, in a new folder"
            )

    def tell_unreadable(self) -> None:
        for text in dict.fromkeys(text for texts in self.ranks.gather(self.untold) for text in texts):
            self.unreadable.add(text)
            self.journal.tell({"event": "unreadable", "step": self.done, "text": text})
        self.untold = []

    def run_probe(self) -> float:
        """Let the probe judge the encoders; returns the seconds that training waited."""
        start = time.perf_counter()
        values = ask(self.probe if self.ranks.first else None, self.model)
        if values is not None:
            seconds = round(time.perf_counter() - start, 3)
            self.journal.tell({"event": "probe", "step": self.done, **values, "seconds": seconds})
        self.ranks.barrier()
        return time.perf_counter() - start

    def fetch(self, measured: Step) -> Record:
        """The log's numbers of this step, in one transfer."""
        tensors = {name: getattr(measured, name) for name in ("loss", "loss_pred", "loss_cls", "grad_norm")}
        tensors |= measured.statistics or {}
        numbers = torch.stack([value.float() for value in tensors.values()]).tolist()
        lr = learning_rate(self.done - 1, self.config.lr, self.config.warmup_steps, self.config.steps)
        return {"step": self.done, **dict(zip(tensors, numbers, strict=True)), "lr": lr}

    def rates(self, steps_per_second: float, flops: float) -> Record:
        """How far and how fast it goes; `mfu` is the share of the device's matrix peak, where that is known."""
        record = {"epoch": self.sampler.epoch(self.done), "crops_per_s": steps_per_second * self.config.batch_size}
        if self.peak:
            record["mfu"] = flops / (self.peak * self.ranks.world)
        return record

    def header(self) -> Record:
        """The first line of the log, and one more each time the run is gone on with: what is run, by what, on what."""
        return {
            "event": "resume" if self.done else "start",
            "step": self.done,
            "config": {**(read_config(self.folder.path) or {}), "train": self.config.to_dict()},  # as it is now
            "versions": versions(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "ranks": self.ranks.world,
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "clips": self.sampler.n_clips,
            "clips_left_out": self.sampler.n_dropped,
        }

    def save(self) -> float:
        """Begin a checkpoint, unless this step has one; returns the seconds that training waited."""
        start = time.perf_counter()
        if self.saved != self.done:
            self.saver.wait()  # or two copies would stand in memory
            self.journal.sync()  # what led to a checkpoint is not lost where the checkpoint is kept
            state = {"step": self.done, "seconds": round(start - self.began, 3)}
            snapshot = Snapshot.take(self.model, self.optimizer, state, self.ranks)
            if self.ranks.first or snapshot.group:
                self.saver.save(snapshot)
            self.saved = self.done
        return time.perf_counter() - start
