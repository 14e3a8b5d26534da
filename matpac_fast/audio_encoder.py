"""AudioEncoder: what every encoder can do with audio, MATPAC or another; a subclass says what its network does."""

from __future__ import annotations

import hashlib
import itertools
import json
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio.decode import RATES, AudioFile, check_samples, resample
from .backend import autocast_dtype, transformed
from .embedding import Embeddings, Windowing, extract
from .errors import AudioError, ConfigError
from .stream import Stream, WholeStream

if TYPE_CHECKING:
    from typing_extensions import Self

Wave: TypeAlias = "Tensor | np.ndarray"
Clip: TypeAlias = "Tensor | np.ndarray | str | os.PathLike[str]"

_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not say
_CHANNELS = 32  # of a recording, at most; a batch of waves as short as this is none


class AudioEncoder(nn.Module):
    """Audio of any length in, embeddings at any temporal support out.

    It stays in evaluation mode, also inside a module that is put to training: see `train`.

    A subclass sets the attributes and writes `forward_pieces`; it may override `columns` and `pieces`, where a window
    goes through its network in several pieces or is worth preparing for many windows at once.

    Attributes:
        name: for people to read.
        sample_rate: Hz, of the waves that the network takes.
        embedding_dim: numbers in one embedding, E.
        n_layers: L of `layers="all"`.
        min_samples: the shortest window; shorter ones are padded with zeros at the end.
        frame_samples: from one frame embedding to the next; None where there are none, only whole windows.
        frame_middle: samples from where a frame embedding starts to the middle of what it sees; None: half of
            `frame_samples`.
        native_window: (size, hop) in samples of the pieces that a longer window is cut into, where a piece of the
            window is the same as a window of its own; else None.
        native_seconds: the longest stretch of audio that the network sees at once; None where it is any.
        beyond: what becomes of a window longer than that, for people to read.
        autocasts: whether `embed_windows` hands the caller's autocast on to `forward_pieces`, which then keeps out of
            it what must not be rounded.
        settings: what beside the weights decides the embeddings, of what JSON can hold; part of `id`.
    """

    name: str = "encoder"
    sample_rate: int = 16_000
    embedding_dim: int
    n_layers: int = 1
    min_samples: int = 1
    frame_samples: int | None = None
    frame_middle: float | None = None
    native_window: tuple[int, int] | None = None
    native_seconds: float | None = None
    beyond: str = "seen whole"
    autocasts: bool = False
    settings: dict[str, Any]
    __call__: Callable[..., Tensor]  # which torch calls Any

    def columns(self, n_samples: int) -> list[int]:
        """Frames in each piece of a window of `n_samples`; all are averaged alike."""
        return [1]

    def rows(self, n_samples: int) -> list[int]:
        """Frame embeddings of each of these pieces with pool "none": the frames, unless a subclass says otherwise."""
        return self.columns(n_samples)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        """Inputs of the network for each window, (start, end) samples of `clip` (S,), one or more each, in order."""
        for a, b in spans.tolist():
            yield F.pad(clip[a:b], (0, max(b, a + self.min_samples) - min(b, len(clip))))

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        """(N, ...) pieces of one shape -> (N, L, E), sums over their frames; with pool "none" (N, L, T, E).

        L is 1 with layers "last". Of any floating-point dtype: the caller makes it float32.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no forward_pieces; write forward_pieces(self, pieces, pool, layers), which "
            "every AudioEncoder needs"
        )

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        """`forward_pieces` for one batch of pieces of several shapes, one tensor a shape."""
        return [self.forward_pieces(pieces, pool, layers) for pieces in groups]

    def facts(self) -> dict[str, Any]:
        """What a user chooses an encoder by: rate in Hz, sizes, and the seconds of frames and windows."""
        return {
            "sample_rate": self.sample_rate,
            "embedding_dim": self.embedding_dim,
            "layers": self.n_layers,
            "frame_seconds": None if self.frame_samples is None else self.frame_samples / self.sample_rate,
            "min_seconds": self.min_samples / self.sample_rate,
            "native_seconds": self.native_seconds,
            "beyond": self.beyond,
        }

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, whatever `mode` is: `probe.train()` of a module with an encoder in it leaves that as it is.

        Batch norm would take its statistics from the batch, and would change those it has even without gradients;
        dropout would draw. To fine-tune, `requires_grad_()` is enough: batch norm then trains its weights under the
        statistics that it has. A layer that shall do otherwise can be put to training itself: `encoder.bn0.train()`.
        """
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def id(self) -> str:
        """SHA-256 over settings, names and weights: the same embeddings have the same id, whatever the file."""
        settings: Any = getattr(self, "settings", None)
        try:
            json.dumps(settings)  # not a set, whose order is another in each process
            items = sorted(settings.items())
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"{self.name}: settings is {settings!r}; expected a dict, which JSON can hold, of what beside the "
                "weights decides the embeddings: give the class one"
            ) from None
        digest = hashlib.sha256(repr(items).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not isinstance(tensor, Tensor) or tensor.is_quantized or hasattr(tensor, "to_local"):
                raise ConfigError(f"{self.name}: {name} is quantized or cut by FSDP; an id is of whole, plain weights")
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @overload
    def embed(
        self,
        audio: Clip,
        sample_rate: int | None = None,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int | None = None,
    ) -> Embeddings: ...
    @overload
    def embed(
        self,
        audio: Sequence[Clip],
        sample_rate: int | None = None,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int | None = None,
    ) -> list[Embeddings]: ...
    def embed(
        self,
        audio: Clip | Sequence[Clip],
        sample_rate: int | None = None,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int | None = None,
    ) -> Embeddings | list[Embeddings]:
        """Embed clips, window by window.

        Args:
            audio: a wave (S,), mono, float in [-1, 1] or int16; a batch of them of one length, (B, S); the path of an
                audio file, whose channels are averaged; or a list of waves and paths, of any lengths. One sample is
                enough: what is shorter than `min_samples` is padded with zeros at the end.
            sample_rate: of the waves, in Hz; resampled (soxr HQ) where it is not the encoder's. A file says its
                own: a path needs none and refuses another; in a list it is that of the waves alone.
            temporal_support: seconds of audio that one embedding sees; None: the whole clip in one embedding.
            hop: seconds from window to window; the temporal support by default.
            pool: "mean", one embedding a window; "none", one a frame.
            layers: "last"; or "all", one embedding for each of the network's layers.
            remainder: what becomes of the end of the clip, see `audio.windows.windows`.
            batch_size: windows per forward pass, of whichever clips; by default 16 on a CPU and 128 on a GPU. Where
                memory runs out it is halved to the end of the call, or of the block in a stream.

        Returns:
            Embeddings on the encoder's device; for a list, a list of them. Neither the batch nor its size changes a
            number, beyond rounding.

        Raises:
            AudioError: a clip that is empty, unreadable, not mono, or has NaN or infinite samples.
            ConfigError: an option that cannot be.
        """
        windowing = self._windowing(temporal_support, hop, pool, layers, remainder)
        with torch.no_grad():
            if isinstance(audio, (list, tuple)):
                return list(extract(self, self._clips(audio, sample_rate), windowing, batch_size))
            if isinstance(audio, (str, os.PathLike)):
                return next(extract(self, [self._read(audio, sample_rate)], windowing, batch_size))
            waves = self._wave(audio, sample_rate, "embed: wave")  # type: ignore[arg-type] # (S,) or (B, S)
            found = list(extract(self, waves.reshape(-1, waves.shape[-1]), windowing, batch_size))
            if waves.ndim == 1:
                return found[0]
            return Embeddings(torch.stack([f.values for f in found]), found[0].start, found[0].end)

    def embed_many(
        self,
        clips: Iterable[Clip],
        sample_rate: int | None = None,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int | None = None,
    ) -> Iterator[Embeddings]:
        """`embed` for clips that do not fit into memory together: takes and yields them one by one, in order.

        A clip's embeddings may come up to 128 clips after it was taken, since its windows wait to fill a batch. At a
        clip that cannot be used it ends: the embeddings of those before it come first, then the error.
        """
        windowing = self._windowing(temporal_support, hop, pool, layers, remainder)
        return torch.no_grad()(extract)(self, self._clips(clips, sample_rate), windowing, batch_size)

    def embed_windows(
        self, waves: Wave, pool: str = "mean", layers: str = "last", batch_size: int | None = None
    ) -> Tensor:
        """Embed windows of one length, each on its own; differentiable where parameters require gradients.

        Under autocast and where gradients are enabled, the networks of MATPAC, M2D, PaSST, BEATs, CNN14, aiSFX and
        CREPE take their products in autocast's dtype; weights and gradients stay float32, and so does what comes before
        the network, the log-mel. Autocast changes nothing where gradients are disabled, where the weights are not
        float32, or of an encoder whose `autocasts` is false, as those of HEAR; nor does it ever change `embed`.

        Args:
            waves: (N, S), mono, at the encoder's rate; float in [-1, 1] or int16, a tensor or array. Values are not
                checked, since that would wait for a GPU.
            pool, layers: as in `embed`.
            batch_size: windows per forward pass, by default as in `embed`.

        Returns:
            (N, E) float32 on the encoder's device, with `pool="none"` (N, T, E); with `layers="all"` an axis L after N.

        Raises:
            AudioError: waves of another shape or dtype, or none.
            ConfigError: an option that cannot be.
        """
        windowing = self._windowing(None, None, pool, layers, "keep")
        waves = _mono(_tensor(waves, "embed_windows: waves"), "embed_windows: waves", dims=(2,)).to(self.device)
        if waves.dtype.itemsize == 2:
            waves = waves.float() / 32768.0 if waves.dtype == torch.int16 else waves.float()
        products = autocast_dtype(self.device) if self.autocasts and torch.is_grad_enabled() else None
        found = extract(self, waves, windowing, batch_size, products)
        values = torch.stack([f.values for f in found])  # (N, T, [L,] E), T 1 where pooled
        values = values.transpose(1, 2) if layers == "all" else values
        return values if pool == "none" else values.squeeze(2 if layers == "all" else 1)

    def forward(self, waves: Wave) -> Tensor:
        """`embed_windows` with its defaults: (N, S) at the encoder's rate -> (N, E) float32.

        So an encoder can be a layer of nn.Sequential or DDP. Gradients are off until `requires_grad_()`. torch.compile
        takes it in several graphs; `load_encoder(compile=True)` compiles the network as one.
        """
        return self.embed_windows(waves)

    def stream(
        self,
        sample_rate: int,
        temporal_support: float | None = None,
        hop: float | None = None,
        pool: str = "mean",
        layers: str = "last",
        remainder: str = "keep",
        batch_size: int | None = None,
    ) -> Stream:
        """The embeddings of `embed` for one clip that arrives in blocks of any size; see `Stream`.

        With no temporal support the whole stream is one window, embedded in bounded memory all the same.
        """
        windowing = self._windowing(temporal_support, hop, pool, layers, remainder)
        kind = WholeStream if temporal_support is None else Stream
        return kind(self, _check_rate(sample_rate, "stream"), windowing, batch_size)

    def check_wave(self, wave: Wave, what: str) -> Tensor:
        """A wave of any supported dtype as finite float32, wherever it is; `what` begins the error's message."""
        wave = _tensor(wave, what).detach()
        if wave.dtype == torch.int16:
            return wave.float() / 32768.0  # else it were of the application's default dtype
        wave = wave.float()
        # Tensors of torch.func and of an export have no values to look at.
        if not (transformed() or _exporting()):
            check_samples(_peak(wave) if wave.numel() else 0.0, what)
        return wave

    def check_mono(self, wave: Wave, what: str, dims: tuple[int, ...] = (1, 2)) -> Tensor:
        """`check_wave` for mono audio alone: (S,) or (B, S), of which `dims` says which are taken."""
        return _mono(self.check_wave(wave, what), what, dims)

    def _wave(self, wave: Wave, sample_rate: int | None, what: str, dims: tuple[int, ...] = (1, 2)) -> Tensor:
        """A checked wave, (S,) or (B, S), at the encoder's rate and on its device."""
        wave = self.check_mono(wave, what, dims)
        if sample_rate is None:
            raise ConfigError(f"{what} needs a sample_rate, in Hz")
        if _check_rate(sample_rate, "embed") != self.sample_rate:
            rows = wave.reshape(-1, wave.shape[-1]).cpu().numpy()
            rows = np.stack([resample(row, sample_rate, self.sample_rate) for row in rows])
            if rows.shape[1] == 0:
                raise AudioError(f"{what} is {tuple(wave.shape)}: no audio, at {self.sample_rate} Hz")
            wave = torch.from_numpy(rows).reshape(*wave.shape[:-1], -1)
        return wave.to(self.device)

    def _read(self, path: str | os.PathLike[str], sample_rate: int | None = None) -> Tensor:
        """The audio of a file, at the encoder's rate; `sample_rate` is what the caller thinks that the file has."""
        with AudioFile(path) as file:
            if sample_rate is not None and _check_rate(sample_rate, "embed") != file.sample_rate:
                raise ConfigError(
                    f"embed: sample_rate is {sample_rate}, and {os.fspath(path)} is at {file.sample_rate} Hz; leave "
                    "it out, since a file says its own"
                )
            return torch.from_numpy(np.concatenate(list(file.blocks(self.sample_rate)))).to(self.device)

    def _clips(self, clips: Iterable[Clip], sample_rate: int | None) -> Iterator[Tensor]:
        for i, clip in enumerate(clips):
            if isinstance(clip, (str, os.PathLike)):
                yield self._read(clip)
            else:
                yield self._wave(clip, sample_rate, f"embed: clip {i}", dims=(1,))

    def _windowing(self, *options: Any) -> Windowing:
        windowing = Windowing(*options)
        windowing.samples(self.sample_rate)
        if windowing.pool == "none" and self.frame_samples is None:
            raise ConfigError(f"embed: {self.name} has no frame embeddings; expected pool 'mean'")
        return windowing


def _peak(wave: Tensor) -> float:
    """The largest absolute sample, NaN where there is one."""
    if wave.device.type == "cpu":  # by one thread: torch's would wait for each other beside those that decode
        samples = wave.numpy(force=True)  # also of a conjugate's imaginary part
        return max(-float(samples.min()), float(samples.max()))  # both are NaN where one sample is
    low, high = torch.stack(wave.aminmax()).tolist()
    return max(-low, high)


def products_dtype(weights: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a network's products are taken in: the 16 bits of its weights, else the encoder's `dtype`. Where both are
    float32, autocast's, which is on where `embed_windows` hands on the caller's."""
    dtype = weights if weights.itemsize == 2 else dtype
    return autocast_dtype(device) or dtype if dtype == weights == torch.float32 else dtype


def _tensor(wave: Wave, what: str) -> Tensor:
    """A tensor of the wave, of a supported dtype; its values are not looked at."""
    if isinstance(wave, np.ndarray):
        if wave.dtype.kind != "f" and wave.dtype.newbyteorder("=") != np.int16:
            raise AudioError(f"{what} is {wave.dtype}; expected float or int16")
        # Of any byte order and precision; writable, since torch warns of what is not.
        wave = torch.from_numpy(np.require(wave, np.float32 if wave.dtype.kind == "f" else np.int16, ["C", "W"]))
    if not isinstance(wave, Tensor):
        raise AudioError(f"{what} is a {type(wave).__name__}; expected a tensor or array")
    if not (wave.is_floating_point() or wave.dtype == torch.int16):
        raise AudioError(f"{what} is {wave.dtype}; expected float or int16")
    return wave


def _mono(wave: Tensor, what: str, dims: tuple[int, ...]) -> Tensor:
    """The wave, if it is of one of the shapes that `dims` says, mono and not empty."""
    if wave.ndim not in dims:
        shapes = " or ".join(("(S,)", "(B, S)")[d - 1] for d in dims)
        do = "give wave[None]" if wave.ndim == 1 else "mix channels down first"
        raise AudioError(f"{what} is {tuple(wave.shape)}; expected {shapes}, mono: {do}")
    if wave.numel() == 0:
        raise AudioError(f"{what} is {tuple(wave.shape)}: no audio")
    if wave.ndim == 2 and wave.shape[1] <= _CHANNELS < wave.shape[0]:
        raise AudioError(
            f"{what} is {tuple(wave.shape)}, which looks like samples by channels, as soundfile reads them; "
            "expected (S,) or (B, S), mono: mix channels down first, wave.mean(1)"
        )
    return wave


def _check_rate(sample_rate: int, what: str) -> int:
    if not isinstance(sample_rate, numbers.Real) or not RATES[0] <= sample_rate <= RATES[1]:
        raise ConfigError(f"{what}: sample_rate is {sample_rate!r}; expected Hz, from {RATES[0]} to {RATES[1]}")
    return sample_rate


def in_pieces(n: int, most: int) -> list[int]:
    """`n` in pieces of `most` and a last one of what is left."""
    whole, rest = divmod(n, most)
    return [most] * whole + [rest] * (rest > 0)
