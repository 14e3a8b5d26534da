"""Encoder: what is kept after pre-training. Audio of any length in, embeddings at any temporal support out."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, ops
from .audio.windows import windows
from .config import PRESETS, MatpacConfig
from .errors import AudioError, CheckpointError, ConfigError
from .model import Matpac
from .nn.frontend import Frontend
from .nn.vit import Transformer
from .reference import LogMelConfig

_SIZES = ("n_mels", "n_frames", "patch_size", "width", "depth", "num_heads", "mlp_ratio")
_UNTRAINED = "untrained-"


@dataclass(frozen=True)
class Embeddings:
    """Embeddings and what each one saw.

    Attributes:
        values: float32, (W, E), or (W, L, E) with `layers="all"`; for a batch of clips (B, W, ...). W counts windows,
            or with `pool="none"` frames.
        start, end: (W,) float64, seconds from the start of the clip.
    """

    values: Tensor
    start: Tensor
    end: Tensor

    def __len__(self) -> int:
        return len(self.start)


class Encoder(nn.Module):
    """The pre-trained ViT and its log-mel front end.

    An embedding of a stretch of audio is the mean over time of its frames; a frame is the concatenation, low frequency
    first, of the `freq` patches of one 16-frame column: 5 x 768 = 3840 numbers for the official model.

    Make one with `load_encoder`.
    """

    def __init__(
        self,
        n_mels: int = 80,
        n_frames: int = 608,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
    ):
        super().__init__()
        self.sizes = dict(zip(_SIZES, (n_mels, n_frames, patch_size, width, depth, num_heads, mlp_ratio), strict=True))
        self.log_mel_config = LogMelConfig(n_mels=n_mels)
        self.n_frames, self.patch_size, self.width, self.depth = n_frames, patch_size, width, depth
        self.freq = n_mels // patch_size
        self.frontend = Frontend(width, patch_size, self.freq, n_frames // patch_size)
        self.student = Transformer(width, depth, num_heads, mlp_ratio)
        self.name = "encoder"
        self.requires_grad_(False).eval()

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.log_mel_config.sample_rate

    @property
    def embedding_dim(self) -> int:
        """Numbers in one embedding."""
        return self.freq * self.width

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame embedding to the next."""
        return self.patch_size * self.log_mel_config.hop / self.sample_rate

    @property
    def native_seconds(self) -> float:
        """The longest stretch that the transformer sees at once; longer windows are cut into pieces of it."""
        return self.n_frames * self.log_mel_config.hop / self.sample_rate

    @property
    def device(self) -> torch.device:
        return self.frontend.cls_token.device

    @property
    def id(self) -> str:
        """SHA-256 over sizes, names and weights: the same embeddings have the same id, whatever file they came from."""
        digest = hashlib.sha256(repr(sorted(self.sizes.items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int = 16,
    ) -> Embeddings:
        """Embed one clip, or a batch of clips of one length, window by window.

        Args:
            wave: (S,) or (B, S), float in [-1, 1] or int16, mono. One sample is enough: what is shorter than one
                log-mel frame (25 ms) is padded with zeros at the end, and the log-mel of every window is padded with
                its mean to whole patches (160 ms), as in the official code.
            sample_rate: of `wave`, in Hz; resampled (soxr HQ) where it is not the encoder's.
            temporal_support: seconds of audio that one embedding sees; None: the whole clip in one embedding.
                A window longer than `native_seconds` is cut into pieces of that, whose frames are averaged together.
            hop: seconds from window to window; the temporal support by default.
            pool: "mean", one embedding a window; "none", one a frame of 160 ms.
            layers: "last", after the final LayerNorm; or "all", every block's output, the last one normalised.
            remainder: what becomes of the end of the clip, see `audio.windows.windows`.
            batch_size: windows per forward pass.

        Returns:
            Embeddings, on the encoder's device.

        Raises:
            AudioError: an empty clip, or one with NaN or infinite samples.
            ConfigError: an option that cannot be.
        """
        if pool not in ("mean", "none"):
            raise ConfigError(f"embed: pool is {pool!r}; expected 'mean' or 'none'")
        if layers not in ("last", "all"):
            raise ConfigError(f"embed: layers is {layers!r}; expected 'last' or 'all'")
        clips = self._clips(wave, sample_rate)
        n_samples = clips.shape[1]
        size = n_samples if temporal_support is None else self._samples("temporal_support", temporal_support)
        spans = windows(n_samples, size, size if hop is None else self._samples("hop", hop), remainder)

        # Windows of one length share batches: all whole ones, then the remainder, which may be shorter or longer.
        parts: list[Tensor] = []
        lengths = spans[:, 1] - spans[:, 0]
        for group in np.split(spans, np.flatnonzero(np.diff(lengths)) + 1):
            cut = [F.pad(clips[:, a:b], (0, max(0, b - n_samples))) for a, b in group.tolist()]
            stacked = torch.stack(cut, dim=1).flatten(0, 1)  # (B * G, length), B-major
            done = [self.embed_windows(some, pool, layers, batch_size) for some in stacked.split(batch_size)]
            parts.append(torch.cat(done).unflatten(0, (len(clips), len(group))))  # (B, G, [L,] [T,] E)
        if pool == "none":  # frames follow each other in time: (B, G * T, [L,] E)
            parts = [p.movedim(-2, 2).flatten(1, 2) for p in parts]
        values = torch.cat(parts, dim=1)
        start, end = self._times(spans, n_samples, pool)
        return Embeddings(values[0] if wave.ndim == 1 else values, start, end)

    def embed_windows(self, waves: Tensor, pool: str = "mean", layers: str = "last", batch_size: int = 16) -> Tensor:
        """Embed windows of one length, each on its own: (N, S) at the encoder's rate and on its device.

        Returns (N, E), with `pool="none"` (N, T, E); with `layers="all"` an axis L after N. Differentiable where the
        encoder's parameters require gradients.
        """
        short = self.log_mel_config.n_fft - waves.shape[-1]
        spec = ops.log_mel(F.pad(waves, (0, short)) if short > 0 else waves, self.log_mel_config)  # (N, F, T)
        spec = F.pad(spec, (0, -spec.shape[-1] % self.patch_size))
        n, _, t = spec.shape
        whole = t // self.n_frames
        parts = []  # (N, L, T', E), or summed over time (N, L, E)
        if whole:
            body = spec[..., : whole * self.n_frames].unflatten(-1, (whole, self.n_frames))
            body = body.transpose(1, 2).flatten(0, 1)  # (N * whole, F, n_frames)
            found = torch.cat([self._layers(some, pool, layers) for some in body.split(batch_size)])
            found = found.unflatten(0, (n, whole))
            parts.append(found.sum(1) if pool == "mean" else found.transpose(1, 2).flatten(2, 3))
        if t % self.n_frames:
            parts.append(self._layers(spec[..., whole * self.n_frames :], pool, layers))
        if pool == "mean":
            out = torch.stack(parts).sum(0) / (t // self.patch_size)
        else:
            out = torch.cat(parts, dim=2)
        return out if layers == "all" else out[:, 0]

    def _layers(self, spec: Tensor, pool: str, layers: str) -> Tensor:
        """(N, F, T), T at most `n_frames` -> (N, L, T', E), or its sum over time, each layer summed as it is made."""
        found = []
        for i, tokens in enumerate(self.student.layers(self.frontend(spec))):
            if layers == "all" or i == self.depth - 1:
                n, _, d = tokens.shape
                grid = tokens[:, 1:].reshape(n, self.freq, -1, d)  # (N, freq, T', D)
                if pool == "mean":
                    found.append(grid.sum(2).flatten(1))
                else:
                    found.append(grid.transpose(1, 2).flatten(2))
        return torch.stack(found, dim=1)

    def _clips(self, wave: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """Checked, resampled, float32 and on the device: (B, S)."""
        clips = torch.as_tensor(wave)
        if clips.ndim not in (1, 2) or not (clips.is_floating_point() or clips.dtype == torch.int16):
            raise AudioError(
                f"embed: wave is {tuple(clips.shape)} {clips.dtype}; expected (S,) or (B, S), float or int16, mono: "
                "mix channels down first"
            )
        if clips.numel() == 0:
            raise AudioError(f"embed: wave is {tuple(clips.shape)}: no audio")
        clips = clips / 32768.0 if clips.dtype == torch.int16 else clips.float()
        clips = clips.reshape(-1, clips.shape[-1])
        if not torch.isfinite(clips).all():
            raise AudioError("embed: wave holds NaN or infinite samples")
        if sample_rate != self.sample_rate:
            from .audio.decode import resample

            clips = torch.from_numpy(
                np.stack([resample(c, sample_rate, self.sample_rate) for c in clips.cpu().numpy()])
            )
        return clips.to(self.device)

    def _samples(self, name: str, seconds: float) -> int:
        samples = round(seconds * self.sample_rate) if np.isfinite(seconds) else 0
        if samples < 1:
            raise ConfigError(f"embed: {name} is {seconds} s; expected at least one sample, {1 / self.sample_rate:g} s")
        return samples

    def _times(self, spans: np.ndarray, n_samples: int, pool: str) -> tuple[Tensor, Tensor]:
        """Seconds at which each window, or each frame, starts and ends; ends stop at the end of the clip."""
        if pool == "none":
            step = self.patch_size * self.log_mel_config.hop
            frames = []
            for a, b in spans.tolist():
                n_frames = self.log_mel_config.n_frames(max(b - a, self.log_mel_config.n_fft))
                starts = a + step * np.arange(-(-n_frames // self.patch_size))
                frames.append(np.stack([starts, np.append(starts[1:], b)], axis=1))
            spans = np.concatenate(frames)
        seconds = torch.from_numpy(np.minimum(spans, n_samples) / self.sample_rate)
        return seconds[:, 0], seconds[:, 1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder alone as safetensors, all of it or none; `load_encoder` reads it."""
        checkpoint.save(path, self.state_dict(), {"kind": "encoder", "sizes": self.sizes})


def list_encoders(pattern: str = "*") -> list[str]:
    """Names that `load_encoder` knows without a file, by shell pattern."""
    return fnmatch.filter([_UNTRAINED + name for name in PRESETS], pattern)


def load_encoder(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    num_heads: int | None = None,
    weights: str = "student",
) -> Encoder:
    """Load an encoder by name or from a file, whose content says what it is; none of it is ever run as code.

    Args:
        name_or_path: a name of `list_encoders`; a run folder of `matpac-fast pretrain` (its newest checkpoint); a
            checkpoint or encoder file of this package; an official training checkpoint or released encoder file.
        device: where to put it; by default CUDA where there is one.
        num_heads: attention heads, for official files off the rule of 64 channels a head.
        weights: "student", as the official package takes, or "teacher", where a training checkpoint holds one.

    Raises:
        CheckpointError: no such name or file, a file that is damaged, unsafe, or no MATPAC encoder.
    """
    name = os.fspath(name_or_path)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if weights not in ("student", "teacher"):
        raise ConfigError(f"load_encoder: weights is {weights!r}; expected 'student' or 'teacher'")
    if name in list_encoders():
        config = MatpacConfig.preset(name.removeprefix(_UNTRAINED))
        state = Matpac(config).state_dict()
        sizes = {size: getattr(config, size) for size in _SIZES}
    else:
        state, sizes = _read(name, num_heads)
    wanted = ("frontend.", f"{weights}.")
    kept = {k.replace("teacher.", "student.", 1): v for k, v in state.items() if k.startswith(wanted)}
    encoder = Encoder(**sizes)
    checkpoint.load_into(encoder, kept, name)
    encoder.name = os.path.basename(name.rstrip("/"))
    return encoder.to(device)


def _read(name: str, num_heads: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not os.path.exists(name):
        raise CheckpointError(f"no encoder {name!r}: neither a file, nor one of {', '.join(list_encoders())}")
    state, metadata = checkpoint.load(checkpoint.find_weights(name))
    if "sizes" in metadata:
        return state, metadata["sizes"]
    if "config" in metadata:
        config = MatpacConfig.from_dict(metadata["config"])
        return state, {size: getattr(config, size) for size in _SIZES}
    if not checkpoint.is_official(state):
        raise CheckpointError(f"{name}: not a MATPAC checkpoint; its first names are {', '.join(list(state)[:3])}")
    state = checkpoint.from_official_names(
        {k: v for k, v in state.items() if not k.startswith(("head.", "head_norm."))}
    )
    sizes = checkpoint.read_sizes(state)
    sizes["num_heads"] = checkpoint.heads_by_rule(sizes["width"], num_heads)
    return state, {size: sizes[size] for size in _SIZES}
