"""Encoder: what is kept after pre-training, the ViT and its log-mel front end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, ops
from .audio_encoder import AudioEncoder, in_pieces, products_dtype
from .config import FRONT_END, MatpacConfig
from .errors import CheckpointError, ConfigError
from .nn.frontend import Frontend
from .nn.initial import seeded
from .nn.linear import is_plain, linear
from .nn.vit import Attention, Block, Transformer
from .reference import LogMelConfig

# Bytes of an MLP's hidden layer on a CPU, for the pieces that go through the network at a time. With more, activations
# no longer stay in the last cache: eight clips of 10 s at once take a sixth longer than four and four (RECORDS.md).
_HIDDEN_BYTES = 2**24
SIZES = ("n_mels", "n_frames", "patch_size", "width", "depth", "num_heads", "mlp_ratio")


class Encoder(AudioEncoder):
    """The pre-trained ViT and its log-mel front end: of MATPAC, MATPAC++ or M2D.

    An embedding of a stretch of audio is the mean over time of its frames; a frame is the concatenation, low frequency
    first, of the `freq` patches of one 16-frame column: 5 x 768 = 3840 numbers for the official model. A window is
    padded with its mean to whole patches (160 ms); one longer than `native_seconds` is cut into pieces of that, whose
    frames are averaged together; all as in the official code.

    Make one with `load_encoder`.

    Args:
        n_mels, n_frames, patch_size, width, depth, num_heads, mlp_ratio: sizes, as in `MatpacConfig`.
        student: the transformer of these sizes; by default a new one.
        front_end: what differs from MATPAC's log-mel, fields of `LogMelConfig`.
    """

    beyond = "averaged over pieces of that length"
    autocasts = True

    def __init__(
        self,
        n_mels: int = 80,
        n_frames: int = 608,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        *,
        student: Transformer | None = None,
        **front_end: Any,
    ):
        super().__init__()
        sizes = (n_mels, n_frames, patch_size, width, depth, num_heads, mlp_ratio)
        self.sizes = self.settings = dict(zip(SIZES, sizes, strict=True)) | front_end
        self.log_mel_config = LogMelConfig(n_mels=n_mels, **front_end)
        self.centered = self.log_mel_config.framing == "center"  # the ends of a window are mirrored
        self.n_frames, self.patch_size, self.width, self.depth = n_frames, patch_size, width, depth
        self.freq = n_mels // patch_size
        self.frontend = Frontend(width, patch_size, self.freq, n_frames // patch_size)
        self.student = student or Transformer(width, depth, num_heads, mlp_ratio)
        self.dtype = torch.float32
        self._compiles = False
        self._compiled: Callable[..., list[Tensor]] | None = None  # made when it is needed; a copy makes its own

        self.sample_rate, self.embedding_dim, self.n_layers = self.log_mel_config.sample_rate, self.freq * width, depth
        self.min_samples = max(self.log_mel_config.n_fft, self.log_mel_config.n_samples(1))
        self.frame_samples = patch_size * self.log_mel_config.hop
        if not self.centered:
            self.native_window = (self.log_mel_config.n_samples(n_frames), n_frames * self.log_mel_config.hop)
        self.requires_grad_(False).eval()

    @property
    def native_seconds(self) -> float:
        """The longest stretch that the transformer sees at once; longer windows are cut into pieces of it."""
        return self.n_frames * self.log_mel_config.hop / self.sample_rate

    def log_mel(self, waves: Tensor) -> Tensor:
        """(N, S) -> (N, n_mels, T) normalised log-mel; what is shorter than a frame is padded with zeros at the end."""
        return ops.log_mel(F.pad(waves, (0, max(0, self.min_samples - waves.shape[-1]))), self.log_mel_config)

    def columns(self, n_samples: int) -> list[int]:
        columns = -(-self.log_mel_config.n_frames(max(n_samples, self.min_samples)) // self.patch_size)
        return in_pieces(columns, self.n_frames // self.patch_size)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        """Log-mels (n_mels, T) of whole patches, at most `n_frames` each."""
        config = self.log_mel_config
        starts, ends = spans.T
        whole = (ends - starts >= self.min_samples) | (ends >= len(clip))
        if not self.centered and (starts % config.hop == 0).all() and whole.all():
            # Every frame of a window is a frame of the clip, so all of them are computed once.
            needed = max(int(ends.max()), int(starts.max()) + self.min_samples)
            spec = self.log_mel(F.pad(clip, (0, max(0, needed - len(clip))))[None])[0]
            for a, b in spans.tolist():
                yield from self._cut(spec[:, a // config.hop :][:, : config.n_frames(max(b - a, self.min_samples))])
            return
        breaks = np.flatnonzero(np.diff(ends - starts)) + 1
        for group in np.split(spans, breaks):  # of one length
            for some in np.array_split(group, -(-len(group) // 64)):
                waves = [F.pad(clip[a:b], (0, max(0, b - len(clip)))) for a, b in some.tolist()]
                for spec in self.log_mel(torch.stack(waves)):
                    yield from self._cut(spec)

    def _cut(self, spec: Tensor) -> tuple[Tensor, ...]:
        return F.pad(spec, (0, -spec.shape[-1] % self.patch_size)).split(self.n_frames, dim=-1)

    @property
    def weights_dtype(self) -> torch.dtype:
        """float32, unless the user has called half(), bfloat16() or double(); `dtype` is that of the products."""
        return self.frontend.cls_token.dtype

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return self.forward_groups([pieces], pool, layers)[0]

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        weights = self.weights_dtype
        dtype = products_dtype(weights, self.dtype, self.device)
        groups = [pieces.to(weights) for pieces in groups]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if self._compiles:  # a graph for each shape, not for each company that shapes may have
                self._compiled = self._compiled or torch.compile(self._forward)
                return [self._compiled([pieces], pool, layers)[0] for pieces in groups]
            if self.device.type != "cpu":
                return self._forward(groups, pool, layers)
            found: list[list[Tensor]] = [[] for _ in groups]
            for portion in self._portions(groups, dtype.itemsize):
                results = self._forward([groups[i][some] for i, some in portion], pool, layers)
                for (i, _), result in zip(portion, results, strict=True):
                    found[i].append(result)
            return [torch.cat(parts) for parts in found]

    def _portions(self, groups: list[Tensor], itemsize: int) -> Iterator[list[tuple[int, slice]]]:
        """The groups' pieces, by group and slice, in portions of much the same size, `_HIDDEN_BYTES` or little more."""
        tokens = [1 + self.freq * (spec.shape[-1] // self.patch_size) for spec in groups]
        ends = np.cumsum([0, *(n * len(spec) for n, spec in zip(tokens, groups, strict=True))])
        hidden = int(self.sizes["width"] * self.sizes["mlp_ratio"]) * itemsize
        count = max(1, -(-int(ends[-1]) * hidden // _HIDDEN_BYTES))
        # The portion of each piece, by the tokens before it.
        owner = [
            (end + n * np.arange(len(spec))) * count // ends[-1]
            for end, n, spec in zip(ends, tokens, groups, strict=False)
        ]
        for portion in range(count):
            slices = [slice(*np.searchsorted(o, [portion, portion + 1])) for o in owner]
            if found := [(i, some) for i, some in enumerate(slices) if some.start < some.stop]:  # not within one piece
                yield found

    def _forward(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        """All tokens go through the linear layers together, so that each weight is read once whatever the lengths."""
        tokens = [self.frontend(spec) for spec in groups]
        shapes = [(len(t), t.shape[1]) for t in tokens]
        sizes = [n * length for n, length in shapes]
        x = torch.cat([t.flatten(0, 1) for t in tokens])  # (N, D)
        found: list[list[Tensor]] = [[] for _ in groups]
        for i, block in enumerate(self.student.blocks):
            x = _through(block, x, shapes)
            if layers == "all" or i == self.depth - 1:
                # Each layer is pooled as it is made: the frames of all are never held together.
                out = self.student.norm(x) if i == self.depth - 1 else x
                for part, shape, mine in zip(out.split(sizes), shapes, found, strict=True):
                    mine.append(self._pool(part.unflatten(0, shape), pool))
        return [torch.stack(mine, dim=1) for mine in found]

    def _pool(self, tokens: Tensor, pool: str) -> Tensor:
        """(N, 1 + freq * T, D) -> frames (N, T, E), or their sum (N, E)."""
        grid = tokens[:, 1:].float().unflatten(1, (self.freq, -1))  # (N, freq, T, D)
        return grid.sum(2).flatten(1) if pool == "mean" else grid.transpose(1, 2).flatten(2)

    def cut(self, layer: int) -> Encoder:
        """Keep the blocks up to `layer`, from 1, and return this encoder: its embeddings are now those that
        `layers="all"` has of that layer, which only the last has normalised, at the cost of these blocks alone.

        Raises:
            ConfigError: no such layer.
        """
        if not 1 <= layer <= self.depth:
            raise ConfigError(f"{self.name}: no layer {layer}; expected one from 1 to {self.depth}")
        if layer < self.depth:
            del self.student.blocks[layer:]
            self.student.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
            self.settings = self.settings | {"depth": layer}
            self.depth = self.n_layers = layer
        return self

    def prepare(self, dtype: torch.dtype = torch.float32, compile: bool = False) -> Encoder:
        """Compute in `dtype` from here on, through torch.compile if asked; see `load_encoder`."""
        self.dtype = dtype
        if dtype != torch.float32:
            # Rounded once; autocast would round them anew in every forward pass.
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)
        self._compiles = self._compiles or compile
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Of copy and pickle: the compiled function is bound to this encoder's weights.
        return {**super().__getstate__(), "_compiled": None}

    def save(self, path: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Write the encoder alone as safetensors, all of it or none; `load_encoder` reads it and checks its id.

        Args:
            path: the file.
            dtype: "float32"; or "float16", half the size: then the file is another encoder, of rounded weights, with
                an id of its own.

        Raises:
            ConfigError: another dtype, or an encoder that was loaded in bfloat16, or cut.
        """
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"save: dtype is {dtype!r}; expected 'float32' or 'float16'")
        if self.dtype != torch.float32:
            raise ConfigError(f"save: the weights are rounded to {self.dtype}; load the encoder in float32 to save it")
        if self.depth < self.sizes["depth"]:
            raise ConfigError(
                f"save: this is the encoder up to layer {self.depth} of {self.sizes['depth']}; save the whole one, and "
                f"load FILE@layer{self.depth} of it"
            )
        stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in checkpoint.state_to_save(self).items()}
        rounded = encoder_of(stored, self.sizes, "student", os.fspath(path))
        checkpoint.save(path, stored, {"kind": "encoder", "sizes": self.sizes, "id": rounded.id})


def encoder_of(state: Mapping[str, Tensor], sizes: Mapping[str, Any], side: str, source: str) -> Encoder:
    """The encoder of one side of a model, "student" or "teacher", with a copy of its weights, in float32.

    Args:
        state: weights under `Matpac`'s names; others than those of the side and the front end are left alone.
        sizes: as `Encoder` takes them.
        source: begins the error's message.

    Raises:
        CheckpointError: a side that is not there; weights that are missing, left over, misshapen or no plain numbers.
    """
    wanted = ("frontend.", f"{side}.")
    kept = {k.replace(f"{side}.", "student.", 1): v for k, v in state.items() if k.startswith(wanted)}
    if not any(name.startswith("student.") for name in kept):
        raise CheckpointError(
            f"{source}: holds no {side}; expected weights of one: a training checkpoint's are of student and teacher"
        )
    if sizes["depth"] > len(kept):
        raise CheckpointError(f"{source}: {sizes['depth']} blocks by its sizes, and only {len(kept)} tensors of them")
    width, depth, patch = sizes["width"], sizes["depth"], sizes["patch_size"]
    tokens = 1 + (sizes["n_mels"] // patch) * (sizes["n_frames"] // patch)
    with torch.device("meta"):  # no memory, no random numbers
        student = Transformer(width, depth, sizes["num_heads"], sizes["mlp_ratio"])
        fits = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
        fits |= {"frontend.cls_token": torch.empty(1, 1, width), "frontend.pos_embed": torch.empty(1, tokens, width)}
        fits |= {"frontend.patch_embed.proj.weight": torch.empty(width, 1, patch, patch)}
        fits |= {"frontend.patch_embed.proj.bias": torch.empty(width)}
    checkpoint.check_fits(fits, kept, source)
    if odd := [name for name, tensor in kept.items() if not checkpoint.is_whole(tensor)]:
        raise CheckpointError(
            f"{source}: damaged: it holds not all numbers of {odd[0]}, which has {kept[odd[0]].numel()}"
        )
    # The small front end is made as it is: without memory, its positions would have torch import its compiler.
    with seeded(0), torch.device("cpu"):
        encoder = Encoder(**sizes, student=student)
    whole = {
        name: tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in kept.items()
    }
    encoder.load_state_dict(whole, assign=True)
    return encoder


def sizes_of(config: MatpacConfig) -> dict[str, Any]:
    """Of its encoder, as `Encoder` takes them."""
    front_end = {name: getattr(config, name) for name in FRONT_END if name not in SIZES}
    # What is MATPAC's is not said: the encoder's id is over what is.
    others = {name: value for name, value in front_end.items() if value != getattr(LogMelConfig, name)}
    return {size: getattr(config, size) for size in SIZES} | others


def _through(block: nn.Module, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """A block's output (N, D) for sequences of several lengths one after the other, shapes (sequences, tokens). A block
    that its user has hooked, wrapped or replaced is called, sequences of one length at a time."""
    if isinstance(block, Block) and is_plain(block, Block) and is_plain(block.attn, Attention):
        x = x + _attention(block.attn, block.norm1(x), shapes)
        return x + block.mlp(block.norm2(x))
    parts = x.split([n * length for n, length in shapes])
    return torch.cat([block(part.unflatten(0, shape)).flatten(0, 1) for part, shape in zip(parts, shapes, strict=True)])


def _attention(attention: Attention, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """`Attention.forward` for such sequences: (N, D)."""
    out = []
    for part, (n, length) in zip(
        linear(attention.qkv, x).split([n * length for n, length in shapes]), shapes, strict=True
    ):
        qkv = part.reshape(n, length, 3, attention.num_heads, -1)
        out.append(ops.attention(qkv).reshape(n * length, -1))
    return linear(attention.proj, out[0] if len(out) == 1 else torch.cat(out))
