"""What must hold before a run begins, or goes on."""

from __future__ import annotations

import dataclasses
import os

import torch

from ..audio.corpus import Corpus
from ..config import MatpacConfig
from ..errors import ConfigError
from ..model import Matpac
from ..reference import LogMelConfig
from .config import TrainConfig, resolve_precision
from .distributed import Ranks
from .sampler import Sampler
from .state import RunFolder, describe, differences, load_weights, read_config


def make_sampler(corpus: Corpus, model_config: MatpacConfig, config: TrainConfig, ranks: Ranks) -> Sampler:
    """What is trained on when, for a corpus and a configuration that go together on these ranks."""
    mel = LogMelConfig()
    if corpus.sample_rate != mel.sample_rate:
        raise ConfigError(f"the corpus is at {corpus.sample_rate} Hz; expected {mel.sample_rate} Hz: prepare it again")
    crops = [mel.n_samples(n) for n in config.crop_frames or (model_config.n_frames,)]
    if config.batch_size % (ranks.world * config.grad_accumulation):
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {ranks.world} processes times a grad_accumulation of "
            f"{config.grad_accumulation} do not divide"
        )
    if config.cuda_graph and (ranks.world > 1 or ranks.device.type != "cuda"):
        raise ConfigError(
            f"cuda_graph is for one process on a GPU; this is {ranks.world} on {ranks.device.type}: leave it out"
        )
    if ranks.world > 1 and len(set(ranks.gather(corpus.fingerprint))) > 1:
        raise ConfigError("the processes do not have the same corpus: copy or prepare it again")
    return Sampler(corpus.frames, crops, config.batch_size, config.seed, config.pad_short, ranks.rank, ranks.world)


def begin(
    folder: RunFolder,
    model: Matpac,
    config: TrainConfig,
    corpus: Corpus,
    init: str | os.PathLike[str] | None,
    device: torch.device,
) -> tuple[TrainConfig, bool]:
    """Check the folder against what is asked, and write down a new run; the configuration with its precision chosen,
    and whether `init` was loaded into the model."""
    stored = read_config(folder.path)
    if config.precision == "auto":
        chosen = stored["train"]["precision"] if stored else resolve_precision("auto", device)
        config = dataclasses.replace(config, precision=chosen)
    asked = describe(model.config, config, corpus, init)
    if stored and (different := differences(stored, asked)):
        raise ConfigError(f"{folder.path} holds another run: {'; '.join(different)}; give a new folder to --out")
    initialised = init is not None and folder.latest() is None
    if init is not None and initialised:
        load_weights(model, init)
    if stored is None:
        folder.write_config(asked)
    return config, initialised
