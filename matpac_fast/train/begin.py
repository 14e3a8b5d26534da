"""What must hold before a run begins, or goes on."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audio.corpus import Corpus
from ..checkpoint import read_latest
from ..config import PRESETS, MatpacConfig
from ..errors import ConfigError
from ..model import Matpac
from .config import TrainConfig, resolve_precision
from .distributed import Ranks, shards
from .sampler import Sampler
from .state import RunFolder, read_config
from .transform import Transform, transform_name
from .weights import load_weights

# What may differ between the halves of a resumed run without changing its result but for rounding.
FREE = frozenset(
    f"train.{name}"
    for name in (
        "log_every",
        "save_every",
        "probe_every",
        "keep_last",
        "keep_every",
        "max_bad_steps",
        "grad_accumulation",
        "compile",
        "cuda_graph",
        "shard",
    )
)

# The options of the command line that give a value: its own name, or another; --set gives any.
_NAMED = (
    *(f"model.{name}" for name in ("mask_ratio", "mcl_heads", "teacher_init", "center_of")),
    *(f"train.{name}" for name in ("steps", "batch_size", "lr", "warmup", "stretch_decays", "pad_short", "visits")),
    *("train.precision", "train.seed", "init"),
    *FREE - {"train.max_bad_steps"},
)
OPTIONS = {
    **{name: "--" + name.rpartition(".")[2].replace("_", "-") for name in _NAMED},
    **{f"model.{name}": "--preset" for preset in PRESETS.values() for name in preset},
    **{f"model.{name}": "--ema" for name in ("ema_start", "ema_end", "head_ema_start", "head_ema_end")},
    **dict.fromkeys(("model.n_frames", "train.crop_frames"), "--crop-seconds"),
}


def make_sampler(corpus: Corpus, model_config: MatpacConfig, config: TrainConfig, ranks: Ranks) -> Sampler:
    """What is trained on when, for a corpus and a configuration that go together on these ranks."""
    crops = check_options(corpus, model_config, config, ranks.device, ranks.world)
    if ranks.world > 1 and len(set(ranks.gather(corpus.fingerprint))) > 1:
        raise ConfigError("the processes do not have the same corpus: copy or prepare it again")
    return sampler_of(corpus, crops, config, ranks.rank, ranks.world)


def sampler_of(corpus: Corpus, crops: Sequence[int], config: TrainConfig, rank: int = 0, world: int = 1) -> Sampler:
    """With crops of so many samples."""
    visits = None
    if config.visits is not None:
        if len(config.visits) != len(corpus.sizes):
            raise ConfigError(
                f"visits is {config.visits}; expected {len(corpus.sizes)}, one of each folder of the corpus: to go on "
                "with a run, give all its folders, in their order"
            )
        visits = np.repeat(config.visits, corpus.sizes)
    return Sampler(corpus.frames, crops, config.batch_size, config.seed, config.pad_short, rank, world, visits)


def name_transform(transform: Transform | None, ranks: Ranks) -> str | None:
    """The transform's name as config.json holds it, the same on every rank."""
    name = transform_name(transform)
    if ranks.world > 1 and len(found := dict.fromkeys(ranks.gather(name))) > 1:
        raise ConfigError(f"the processes have different transforms, {', '.join(map(str, found))}: give all the same")
    return name


def check_options(
    corpus: Corpus, model_config: MatpacConfig, config: TrainConfig, device: torch.device, world: int
) -> list[int]:
    """Raise ConfigError where these do not go together on so many processes; the samples of the crops."""
    mel = model_config.log_mel
    if corpus.sample_rate != mel.sample_rate:
        raise ConfigError(
            f"the corpus is at {corpus.sample_rate} Hz; expected {mel.sample_rate} Hz, the model's sample_rate: "
            f"prepare it with --sample-rate {mel.sample_rate}, or give the model a front end of {corpus.sample_rate} "
            "Hz, as docs/training.md shows"
        )
    patch, longest = model_config.patch_size, model_config.n_frames
    frames = config.crop_frames or (longest,)
    if odd := [n for n in frames if n % patch or not 0 < n <= longest]:
        raise ConfigError(f"crop_frames holds {odd[0]}; expected multiples of {patch}, of at most n_frames, {longest}")
    for n in frames:
        tokens = model_config.freq * (n // patch)
        if not 0 < (visible := model_config.n_visible(tokens)) < tokens:
            raise ConfigError(
                f"a crop of {n} frames has {tokens} patches, of which a mask_ratio of {model_config.mask_ratio} leaves "
                f"{visible} visible; expected at least one visible and one masked: give longer crops or another ratio"
            )
    if config.batch_size % (world * config.grad_accumulation):
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {world} processes times a grad_accumulation of "
            f"{config.grad_accumulation} do not divide"
        )
    if config.shard and world > 1 and not shards(device):
        raise ConfigError(f"shard on a CPU needs torch 2.8 or later; this is {torch.__version__}")
    if config.cuda_graph and (world > 1 or device.type != "cuda"):
        raise ConfigError(f"cuda_graph is for one process on a GPU; this is {world} on {device.type}: leave it out")
    return [mel.n_samples(n) for n in frames]


def begin(
    folder: RunFolder,
    model: Matpac,
    config: TrainConfig,
    corpus: Corpus,
    init: str | os.PathLike[str] | None,
    device: torch.device,
    transform: str | None = None,
) -> tuple[TrainConfig, bool]:
    """Check the folder against what is asked, and write down a new run; the configuration with its precision chosen,
    and whether `init` was loaded into the model."""
    new = read_config(folder.path) is None
    config = check_run(folder.path, model.config, config, corpus, init, device, transform)
    initialised = init is not None and folder.latest() is None
    if init is not None and initialised:
        load_weights(model, init)
    if new:
        folder.write_config(describe(model.config, config, corpus, init, transform))
    return config, initialised


def check_run(
    run: Path,
    model: MatpacConfig,
    config: TrainConfig,
    corpus: Corpus,
    init: str | os.PathLike[str] | None,
    device: torch.device,
    transform: str | None = None,
    by_set: Collection[str] = (),
) -> TrainConfig:
    """Raise ConfigError where another run is in `run` than is asked; the configuration with its precision chosen.

    `by_set` are the fields that --set gives, such as "model.depth"; the message then names it, not their own option.
    """
    stored = read_config(run)
    if config.precision == "auto":
        chosen = stored["train"]["precision"] if stored else resolve_precision("auto", device)
        config = dataclasses.replace(config, precision=chosen)
    if stored and (different := differences(stored, describe(model, config, corpus, init, transform))):
        raise ConfigError(refusal(run, different, by_set))
    return config


def check_sizes(
    init: str | os.PathLike[str], theirs: Mapping[str, Any], asked: Mapping[str, Any], by_set: Collection[str] = ()
) -> None:
    """Raise ConfigError where other sizes are asked of a model than those of the weights in `init` that it begins from.

    Args:
        init: where the weights are.
        theirs: their sizes, of `weights_sizes`.
        asked: the fields of `MatpacConfig` that were given; what was not is as theirs.
        by_set: as in `check_run`.
    """
    different = {f"model.{name}": (old, asked[name]) for name, old in theirs.items() if asked.get(name, old) != old}
    if different:
        options = _by_option(different, by_set)
        raise ConfigError(
            f"{os.fspath(init)} holds weights of another model: {'; '.join(_told(options))}. "
            f"To begin from them, leave out {', '.join(options)}"
        )


def describe(
    model: MatpacConfig,
    train: TrainConfig,
    corpus: Corpus,
    init: str | os.PathLike[str] | None,
    transform: str | None = None,
) -> dict[str, Any]:
    """What makes a run the run it is, as config.json holds it."""
    return {
        "model": model.to_dict(),
        "train": train.to_dict(),
        "corpus": {"fingerprint": corpus.fingerprint, "clips": len(corpus.frames)},
        "init": None if init is None else os.fspath(init),
        "transform": transform,
    }


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Name -> both values, of all that two configurations do not share; what changes no result may differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(stored.keys() | asked.keys()):
        old, new = stored.get(key), asked.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{path}{key}.")
        elif old != new and f"{path}{key}" not in FREE:
            found[f"{path}{key}"] = old, new
    return found


def refusal(run: Path, different: Mapping[str, tuple[Any, Any]], by_set: Collection[str] = ()) -> str:
    """What differs, in the words of the options that give it, and how to go on."""
    corpus = [name for name in different if name.startswith("corpus.")]
    options = _by_option({name: values for name, values in different.items() if name not in corpus}, by_set)
    told, advice, quoted = _told(options), [], shlex.quote(str(run))
    begun = bool(read_latest(run))  # else it has no weights to begin from
    if corpus:
        clips = different.get("corpus.clips")
        count = f", of {clips[0]} clips there and {clips[1]} here" if clips else ""
        told.insert(0, f"its corpus is another one, or has grown or changed since{count}")
        advice.append(
            f"To go on with its weights on this corpus, add --init {quoted} and give a new folder to --out"
            if begun
            else "It has no checkpoint yet: for a run on this corpus, give a new folder to --out"
        )
    else:
        if different.keys() == {"transform"}:  # the one that Python alone gives
            old = different["transform"][0]
            advice.append(
                f"To go on with it, give pretrain {'no transform' if old is None else f'the transform {old}'}"
            )
        elif "" not in options:
            advice.append(f"To go on with it, leave out {', '.join(options)}")
        from_it = f", with --init {quoted} for one from its weights" if begun else ""
        advice.append(f"For another run, give a new folder to --out{from_it}")
    return f"{run} holds another run: {'; '.join(told)}. {'. '.join(advice)}"


def _by_option(different: Mapping[str, tuple[Any, Any]], by_set: Collection[str]) -> dict[str, list[str]]:
    """Option, "" where none gives it -> what differs by it."""
    options: dict[str, list[str]] = {}
    for name, (old, new) in different.items():
        option = "" if name in by_set else OPTIONS.get(name, "")
        if new is False:
            option = option.replace("--", "--no-", 1)
        if not option and name.startswith(("model.", "train.")):
            option = f"--set {name}"
        options.setdefault(option, []).append(f"{name} is {old!r} there and {new!r} here")
    return options


def _told(options: Mapping[str, list[str]]) -> list[str]:
    return [", ".join(phrases) + (f" ({option})" if option else "") for option, phrases in options.items()]
