"""The HEAR 2021 common API: `hear-validator matpac_fast.hear --model FILE`, heareval, and whatever else speaks it."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio_encoder import AudioEncoder
from .encoder import load_encoder
from .errors import AudioError, ConfigError
from .vit_encoder import Encoder
from .weights import DEFAULT

# HEAR asks for a timestamp at least every 50 ms. A frame embedding sees 160 ms, so the audio goes through the network
# four times, 40 ms further along each time.
_PASSES = 4


class HearModel(nn.Module):
    """An encoder under the attributes that HEAR reads.

    Attributes:
        sample_rate: of the audio to give, in Hz.
        scene_embedding_size, timestamp_embedding_size: numbers in an embedding.
        passes: how many times the audio goes through the network for timestamp embeddings: with 4 they come every
            40 ms, with 1 every 160 ms in a quarter of the time.
    """

    def __init__(self, encoder: AudioEncoder):
        super().__init__()
        self.encoder = encoder
        self.sample_rate = encoder.sample_rate
        self.scene_embedding_size = encoder.embedding_dim
        self.timestamp_embedding_size = encoder.embedding_dim
        self.passes = _PASSES if isinstance(encoder, Encoder) else 1


def load_model(model_file_path: str | os.PathLike[str] = "") -> HearModel:
    """Load what `load_encoder` loads: a path or a name; by default the pre-trained encoder of this package.

    Raises:
        CheckpointError: no encoder.
    """
    return HearModel(load_encoder(model_file_path or DEFAULT))


def get_scene_embeddings(audio: Tensor | np.ndarray, model: HearModel) -> Tensor:
    """One embedding a sound: audio (N, S) at `model.sample_rate`, float in [-1, 1] or int16 -> (N, E) float32."""
    return model.encoder.embed(_checked(audio), model.sample_rate).values[:, 0]


def get_timestamp_embeddings(audio: Tensor | np.ndarray, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embeddings (N, T, E) float32, and (N, T) float32 the milliseconds at the middle of what each one sees.

    The first stands at 0 ms where the model's passes allow it, and sees silence before the sound; none stands past the
    sound's end but where it is the only one.
    """
    audio, encoder = _checked(audio), model.encoder
    frame, passes, n = encoder.frame_samples, model.passes, audio.shape[1]
    if frame is None:
        raise ConfigError(f"get_timestamp_embeddings: {encoder.name} has no frame embeddings")
    if not (isinstance(passes, int) and 1 <= passes <= frame):
        raise ConfigError(f"get_timestamp_embeddings: model.passes is {passes}; expected a whole number, 1 to {frame}")
    middle = frame / 2 if encoder.frame_middle is None else encoder.frame_middle
    shifts = _shifts(frame, passes, middle)
    shifts = [s for s in shifts if s <= 0 or s + encoder.min_samples <= n]
    counts = [min(sum(encoder.rows(n - s)), max(0, math.floor((n - middle - s) / frame) + 1)) for s in shifts]
    if not any(counts):
        counts[0] = 1
    begins = torch.cat([s + frame * torch.arange(c, device="cpu") for s, c in zip(shifts, counts, strict=True)])
    begins, order = begins.sort()
    places = order.argsort().split(counts)
    values = torch.empty(len(audio), len(begins), encoder.embedding_dim, dtype=torch.float32, device=encoder.device)
    for shift, count, place in zip(shifts, counts, places, strict=True):
        if count:
            found = encoder.embed(_from(audio, shift), model.sample_rate, pool="none").values
            values[:, place.to(values.device)] = found[:, :count]
    times = ((begins.double() + middle) * 1000 / encoder.sample_rate).float().to(encoder.device)
    return values, times.expand(len(audio), -1).contiguous()


def _shifts(frame: int, passes: int, middle: float) -> list[int]:
    """Samples that each pass begins after the sound, or before it, in order: frames of all passes are equally far
    apart, and of those whose middle the sound has none is missing."""
    later = [frame * i // passes for i in range(passes)]
    return sorted(s - frame if s > 0 and s - frame + middle >= 0 else s for s in later)


def _from(audio: Tensor | np.ndarray, shift: int) -> Tensor | np.ndarray:
    """The sounds from sample `shift` on, with as much silence before them where it is negative."""
    if shift >= 0:
        return audio[:, shift:]
    if isinstance(audio, np.ndarray):
        return np.pad(audio, ((0, 0), (-shift, 0)))
    return F.pad(audio, (-shift, 0))


def _checked(audio: Tensor | np.ndarray) -> Tensor | np.ndarray:
    if not isinstance(audio, (Tensor, np.ndarray)) or audio.ndim != 2:
        came = tuple(audio.shape) if isinstance(audio, (Tensor, np.ndarray)) else f"a {type(audio).__name__}"
        raise AudioError(f"HEAR: audio is {came}; expected (sounds, samples)")
    if 0 in audio.shape:
        raise AudioError(f"HEAR: audio is {tuple(audio.shape)}: no audio")
    return audio
