"""The study: encoders x temporal supports x tasks, each cell probed with an interval, each temporal support costed.

OUT/embeddings/...       see `cache`
OUT/probes/KEY.npz       scores of every test clip by the chosen probes of one cell
OUT/cost.parquet         see `cost`
OUT/results.parquet, comparisons.parquet, encoders.parquet, choices.parquet     see `results`

What is there under its key is not done again, so a killed study goes on, and one more encoder costs only itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..audio_encoder import AudioEncoder
from ..embedding import Windowing
from ..encoder import load_encoder
from ..errors import AudioError, ConfigError
from ..files import atomic, check_no_file, clear_torn, damage_named, entries_of
from ..tasks import DatasetError, Fold, Task, load_task
from .cache import Aggregate, Cache, View, fill, hash_audio, shared_audio
from .cost import Cost, device_name, measure
from .linear import ProbeConfig, Probed, probe
from .own_code import class_name, dtype_name, own_code
from .results import Cell, Progress, add_cost, ignored, read_costs

_PROBES = 6  # raised where stored probes are others: before 6 all seeds chose by the same validation clips
_OURS = {"probes", "cost.parquet", "results.parquet", "problems.txt"}  # and embeddings/, the first to be there
_SHORTEST = 1e-3  # seconds that a window or a hop has at least
_PATIENCE = timedelta(days=14)  # gloo counts milliseconds in 31 bits, which hold 24 days


@dataclass(frozen=True)
class StudyConfig:
    """What is studied; see `matpac-fast study --help` for the words."""

    encoders: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    temporal_supports: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
    hop: float | None = None
    remainder: str = "keep"
    aggregate: Aggregate = "mean"
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    cost: bool = True
    batch_sizes: tuple[int, ...] = (1, 16)
    batch_size: int | None = None  # for embedding; as `AudioEncoder.embed` takes it
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0  # of the splits that a task does not have
    partial: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("encoders", "temporal_supports"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"study: {name} {values}; expected at least one, each once")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"study: tasks {self.tasks}; expected each once")
        if not self.tasks and not self.cost:
            raise ConfigError("study: neither tasks nor costs; expected something to study")
        counts = [n for n in (*self.batch_sizes, self.batch_size, self.workers) if n is not None]
        if not self.batch_sizes or min(counts) < 1:
            named = {"batch sizes": self.batch_sizes, "batch size": self.batch_size, "workers": self.workers}
            came = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
            raise ConfigError(f"study: {came}; expected 1 or more of each")
        for name, values in (("temporal support", self.temporal_supports), ("hop", (self.hop,))):
            for seconds in values:
                if seconds is not None and not _SHORTEST <= seconds < math.inf:
                    came = f"study: {name} is {seconds:g} s"
                    raise ConfigError(f"{came}; expected a number of seconds from {_SHORTEST:g} up, such as 2")
        Windowing(self.temporal_supports[0], self.hop, remainder=self.remainder)
        self.trained()  # raises where the two do not go together

    def trained(self) -> ProbeConfig:
        """How the probes are, of what `aggregate` gives them."""
        return dataclasses.replace(self.probe, attentive=self.aggregate == "attend")


def check_folder(out: Path, option: str = "--out") -> None:
    """Raise ConfigError where `out` is no folder, or holds things and no study: nothing is mixed in there."""
    check_no_file(out, "the study", mend=f"give another to {option}")
    entries = entries_of(out)
    embeddings = "embeddings" in entries and not (out / "embeddings" / "settings.json").exists()  # else a collection
    if entries and not (embeddings or entries & _OURS):
        raise ConfigError(f"{out} is not empty and holds no study; give a new folder to {option}")
    if "settings.json" in entries and '"made"' not in (out / "settings.json").read_text(errors="replace"):
        raise ConfigError(f"{out} holds a settings.json that is not a study's; give a new folder to {option}")


Loaded = tuple[list[Task], dict[str, list[str]]]  # the tasks, and of each, by its name, the SHA-256 of its clips


def run_study(config: StudyConfig, out: Path, progress: Progress = ignored, loaded: Loaded | None = None) -> list[Cell]:
    """Cost, embed and probe everything that is missing in `out`, and return the cells, task by task.

    Under torchrun every process embeds its share, and the first one does the rest once the others are through: costs,
    which want a machine at rest, clips that nobody has embedded, and the probes. The others return no cells. `loaded`
    is what `load_tasks` gave, where that is at hand. With `config.partial` files that cannot be decoded are left out of
    their task for every encoder, so that all are scored on the same clips.

    Raises:
        DatasetError: a task's folder is incomplete or altered, and nothing was computed; or too little is left of it.
        ConfigError, CheckpointError, AudioError: what cannot be studied.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(config.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    tasks, audio = load_tasks(config, progress) if loaded is None else loaded
    if rank == 0:
        clear_torn(out, "**/.*.tmp", older=86_400)
    if world > 1:
        embed_share(config, out, (tasks, audio), device, (rank, world), progress)
        _wait_for_all(rank, world)
        if rank > 0:
            return []
        if device.type == "cuda":
            torch.cuda.empty_cache()  # costs are measured in another process
    costs = cost_sweep(config, out, progress) if config.cost else {}
    left_out, caches = embed_share(config, out, (tasks, audio), device, (0, 1), progress)
    if left_out:
        tasks = [_without(task, audio[task.name], left_out) for task in tasks]
        audio = {name: [each for each in names if each not in left_out] for name, names in audio.items()}
    return _probe_all(config, out, tasks, audio, caches, costs, device, progress)


def load_tasks(config: StudyConfig, progress: Progress = ignored) -> Loaded:
    """The tasks, each of its files checked, and the hashes of all clips."""
    tasks = [load_task(spec, config.partial, config.seed) for spec in config.tasks]
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigError(f"study: two tasks are called {[task.name for task in tasks]}; rename one's folder")
    paths = [path for task in tasks for path in task.paths]
    names = iter(hash_audio(paths, config.workers, lambda done: progress("hashing", done, len(paths))))
    return tasks, {task.name: list(itertools.islice(names, len(task.paths))) for task in tasks}


def embed_share(
    config: StudyConfig,
    out: Path,
    loaded: Loaded,
    device: torch.device,
    share: tuple[int, int],
    progress: Progress = ignored,
) -> tuple[dict[str, str], dict[str, list[Cache]]]:
    """Embed what is missing, by every encoder; with `share` (rank, of how many) only that part of the clips.

    Returns hash -> reason of the files that a partial study leaves out, as far as they are in this share; and each
    encoder's caches: to load it again might give other weights, as those of a run that is being trained.
    """
    left_out: dict[str, str] = {}
    caches: dict[str, list[Cache]] = {}
    paths = [path for task in loaded[0] for path in task.paths]
    audio = [name for task in loaded[0] for name in loaded[1][task.name]]
    each = len(paths) * len(config.temporal_supports)  # clips of an encoder, at every TS
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress("embedding", done, each * len(config.encoders))

    for number, name in enumerate(config.encoders):
        encoder = load_encoder(name, device, dtype=config.dtype)
        caches[name] = _caches(config, out, encoder)
        done = number * each
        try:
            fill(caches[name], audio, paths, config.workers, more, share, left_out if config.partial else None)
        except AudioError as error:
            hint = "" if config.partial else "; mend or remove it, or leave such files out with --partial"
            raise AudioError(f"{error}{hint}") from error
        # Makes room for the next one, and for the probes.
        encoder.cpu()
        for cache in caches[name]:
            cache.drop_encoder()
        del encoder
    return left_out, caches


def _without(task: Task, audio: list[str], left_out: dict[str, str]) -> Task:
    """The task of those clips whose audio is not left out."""
    keep = np.array([name not in left_out for name in audio], bool)
    if keep.all():
        return task
    bad = [(str(path), left_out[name]) for path, name in zip(task.paths, audio, strict=True) if name in left_out]
    place = np.cumsum(keep) - 1  # of a clip that stays, among those that stay

    def rest(part: np.ndarray, number: int, what: str) -> np.ndarray:
        left = place[part[keep[part]]]
        if not len(left):
            raise DatasetError(
                f"{task.name}: fold {number} has no {what} clips without the {len(bad)} files that cannot be decoded, "
                f"such as {bad[0][0]}: {bad[0][1]}",
                bad,
            )
        return left

    folds = [
        Fold(
            rest(fold.train, i, "training"),
            rest(fold.test, i, "test"),
            None if fold.valid is None else rest(fold.valid, i, "validation"),
        )
        for i, fold in enumerate(task.folds)
    ]
    return dataclasses.replace(
        task,
        paths=[path for path, kept in zip(task.paths, keep, strict=True) if kept],
        targets=task.targets[keep],
        groups=task.groups[keep],
        folds=folds,
        seconds=task.seconds[keep],
        subsets={name: member[keep] for name, member in task.subsets.items()},
        left_out=[*task.left_out, *bad],
    )


def cost_sweep(config: StudyConfig, out: Path, progress: Progress) -> dict[tuple[str, float, int], Cost]:
    """(encoder, temporal support, batch size) -> its cost; those in cost.parquet on the same machine stand."""
    path = out / "cost.parquet"
    threads, device = torch.get_num_threads(), torch.device(config.device)
    total = len(config.encoders) * len(config.temporal_supports) * len(config.batch_sizes)
    found: dict[tuple[str, float, int], Cost] = {}
    progress("measuring cost", 0, total)
    for name in config.encoders:
        encoder = load_encoder(name, "cpu", dtype=config.dtype)
        kind = dict(encoder_id=encoder.id, dtype=dtype_name(encoder), encoder_class=class_name(encoder))
        kind |= dict(code=own_code(encoder))
        for ts in config.temporal_supports:
            for batch in config.batch_sizes:
                wanted = kind | dict(temporal_support=ts, batch=batch, threads=threads)
                wanted |= dict(device=device_name(device), torch=torch.__version__, matpac_fast=__version__)
                known = read_costs(path)  # again each time: another study may write there too
                same = [cost for cost in known if all(getattr(cost, key) == value for key, value in wanted.items())]
                if not same:
                    same = [measure(name, ts, batch, config.device, config.dtype, threads)]
                    add_cost(path, same[0])
                found[name, ts, batch] = dataclasses.replace(same[0], encoder=name)  # it may have had another then
                progress("measuring cost", len(found), total)
    return found


def _caches(config: StudyConfig, out: Path, encoder: AudioEncoder) -> list[Cache]:
    identity = encoder.id
    views = [View(ts, config.hop, config.remainder, config.aggregate) for ts in sorted(config.temporal_supports)]
    return [Cache(out / "embeddings", encoder, view, config.batch_size, identity) for view in views]


def _probe_all(
    config: StudyConfig,
    out: Path,
    tasks: list[Task],
    audio: dict[str, list[str]],
    caches: dict[str, list[Cache]],
    costs: dict[tuple[str, float, int], Cost],
    device: torch.device,
    progress: Progress,
) -> list[Cell]:
    cells: dict[str, list[Cell]] = {task.name: [] for task in tasks}
    copies = {task.name: shared_audio(audio[task.name], task.folds) for task in tasks}
    done, total = 0, len(tasks) * len(config.encoders) * len(config.temporal_supports)
    progress("probing", done, total)
    for name in config.encoders:
        for task in tasks:
            for cache in caches[name]:
                part = lambda share, done=done: progress("probing", done + share, total)  # noqa: E731
                probed = _probe(config, out, cache, task, audio[task.name], device, part)
                windows, full = _windows(task, cache.view, cache.sample_rate)
                mine = [costs[key] for key in costs if key[:2] == (name, cache.view.temporal_support)]
                identity, dim, shared = cache.settings["encoder"], cache.embedding_dim, copies[task.name]
                cell = Cell(task, name, identity, dim, cache.view, probed, windows, shared, mine, full)
                cells[task.name].append(cell)
                done += 1
                progress("probing", done, total)
    return [cell for task in tasks for cell in cells[task.name]]


def _probe(
    config: StudyConfig,
    out: Path,
    cache: Cache,
    task: Task,
    audio: list[str],
    device: torch.device,
    progress: Callable[[float], None],
) -> Probed:
    """The probes of one cell; read where they are there."""
    settings = config.trained()
    made_of = [_PROBES, cache.key, task.fingerprint, hashlib.sha256("".join(audio).encode()).hexdigest()]
    made_of += [json.dumps(dataclasses.asdict(settings), sort_keys=True), task.metric, device.type, __version__]
    path = out / "probes" / f"{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]}.npz"
    if not path.exists():
        rows = cache.read(audio)
        found = probe(
            rows,
            task.targets,
            task.groups,
            task.folds,
            len(task.classes),
            settings,
            task.metric,  # pyright: ignore[reportArgumentType]
            device,
            progress=progress,
        )
        arrays = {f"scores{f}": scores.float().numpy() for f, scores in enumerate(found.scores)}
        for key in ("valid", "valid_score", "chosen", "untrained"):
            arrays[key] = getattr(found, key).double().numpy()
        with atomic(path) as beside, open(beside, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    with damage_named(path), np.load(path, allow_pickle=False) as stored:
        scores = [torch.from_numpy(stored[f"scores{f}"]).double() for f in range(len(task.folds))]
        valid, valid_score, chosen = (torch.from_numpy(stored[key]) for key in ("valid", "valid_score", "chosen"))
        untrained = torch.from_numpy(stored["untrained"]).bool()
    return Probed(scores, valid, valid_score, chosen, untrained)


def _windows(task: Task, view: View, rate: int) -> tuple[float, float]:
    """`windows` and `full_windows` of a cell."""
    lengths, clips = np.unique(np.maximum(1, np.rint(task.seconds * rate)).astype(np.int64), return_counts=True)
    windowing = Windowing(view.temporal_support, view.hop, remainder=view.remainder)
    size, _ = windowing.samples(rate)
    assert size is not None
    if view.aggregate == "one":  # never padded
        return 1.0, float(np.average(np.minimum(lengths, size) / size, weights=clips))
    spans = [windowing.spans(n, rate) for n in lengths.tolist()]
    counts, seen = zip(*((len(each), (each[:, 1] - each[:, 0]).sum() / size) for each in spans), strict=True)
    return float(np.average(counts, weights=clips)), float(np.average(seen, weights=clips))


def _wait_for_all(rank: int, world: int) -> None:
    """Until every process has embedded its share, however long the slowest takes; torchrun ends all where one dies."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=_PATIENCE)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
