"""BEATs (2212.09058): a post-norm transformer on Kaldi filterbanks, with gated relative positions and deep norm.

`load_encoder("beats:FILE")` takes the official checkpoints, pre-trained or fine-tuned; `load_encoder("beats")` is an
untrained one of the official size. A frame is the mean over the eight patches of 160 ms; the end of a window that does
not fill a patch is not seen, as officially. Positions are relative, so any length runs, at a quadratic cost: a window
over 30 s is cut into pieces of that, whose frames follow each other.
Facts from microsoft/unilm, beats: BEATs.py, backbone.py, modules.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint, ops
from ..audio_encoder import in_pieces
from ..errors import AudioError, CheckpointError
from ..nn.initial import in_float32, seeded
from ..nn.linear import linear, linear_gelu
from ..reference import LogMelConfig
from .network import Network, fill, padded, recognised

# Kaldi's filter bank on 16-bit amplitudes.
BEATS_LOG_MEL = LogMelConfig(
    n_fft=512,
    n_mels=128,
    f_min=20.0,
    log_offset=0.0,
    mean=15.41663,
    std=2 * 6.55582,
    bank="kaldi",
    window="povey",
    framing="kaldi",
    preemphasis=0.97,
    gain=2.0**15,
    log_floor=1.1920928955078125e-07,
)
_PATCH = 16
_HOP = _PATCH * BEATS_LOG_MEL.hop
_ROWS = BEATS_LOG_MEL.n_mels // _PATCH
_MAX_COLUMNS = 188  # 30 s
_MAX_DISTANCE = 800
_HEADS = ("predictor.",)  # of the fine-tuned ones
# What the official configuration must say where a file holds one: the other forms have no released model.
_FORM = {
    "input_patch_size": _PATCH,
    "conv_bias": False,
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "activation_fn": "gelu",
}


class GatedAttention(nn.Module):
    """Self-attention whose relative position bias each query scales by a gate of its own."""

    def __init__(self, width: int, num_heads: int, buckets: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        # Official files hold a table for every layer; they are one, and only the first is read.
        self.relative_attention_bias = nn.Embedding(buckets, num_heads)
        self.grep_linear = nn.Linear(width // num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, num_heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
        """x (N, T, D), bias (H, T, T), keep (N, T) bool of tokens that are audio -> (N, T, D)."""
        q, k, v = (
            linear(f, x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, H, T, D/H)
        open_, reset = self.grep_linear(q).unflatten(3, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)  # (N, H, T, 1)
        mask = (open_ * (reset * self.grep_a - 1.0) + 2.0) * bias
        if keep is not None:
            mask = mask.masked_fill(~keep[:, None, None], -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype))
        return linear(self.out_proj, out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, each followed by its norm; deep norm weighs the residual by (2 depth) ** (1/4)."""

    def __init__(self, width: int, hidden: int, num_heads: int, buckets: int, depth: int):
        super().__init__()
        self.self_attn = GatedAttention(width, num_heads, buckets)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.alpha = (2 * depth) ** 0.25

    def forward(self, x: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias, keep))
        return self.final_layer_norm(self.alpha * x + linear(self.fc2, linear_gelu(self.fc1, x)))


class PositionConv(nn.Module):
    """A grouped convolution over time whose weight is normed over all but its taps; official names `0.*`."""

    def __init__(self, width: int, taps: int, groups: int):
        super().__init__()
        self.taps, self.groups = taps, groups
        conv = nn.Module()
        conv.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        conv.weight_v = nn.Parameter(torch.randn(width, width // groups, taps) * math.sqrt(4.0 / (taps * width)))
        conv.bias = nn.Parameter(torch.zeros(width))
        self.add_module("0", conv)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.get_submodule("0")
        weight = torch._weight_norm(conv.weight_v, conv.weight_g, 2)  # type: ignore[arg-type]
        x = F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=self.taps // 2, groups=self.groups)  # type: ignore[arg-type]
        return F.gelu(x[..., : x.shape[-1] - (self.taps % 2 == 0)].transpose(1, 2))


class Beats(Network):
    """BEATs under its official parameter names.

    Args:
        embed, width, hidden, depth, num_heads: of the patches and of the transformer.
        conv_taps, conv_groups: of the convolution that gives positions.
        buckets, max_distance: of the relative positions, in tokens.
    """

    sample_rate = BEATS_LOG_MEL.sample_rate
    frame_samples = _HOP

    def __init__(
        self,
        embed: int = 512,
        width: int = 768,
        hidden: int = 3072,
        depth: int = 12,
        num_heads: int = 12,
        conv_taps: int = 128,
        conv_groups: int = 16,
        buckets: int = 320,
        max_distance: int = _MAX_DISTANCE,
    ):
        super().__init__()
        self.settings = {"kind": "beats", "num_heads": num_heads, "max_distance": max_distance}
        self.embedding_dim, self.n_layers, self.max_distance = width, depth, max_distance
        self.patch_embedding = nn.Conv2d(1, embed, _PATCH, _PATCH, bias=False)
        self.layer_norm = nn.LayerNorm(embed)
        self.post_extract_proj = nn.Linear(embed, width)
        self.encoder = nn.Module()
        self.encoder.pos_conv = PositionConv(width, conv_taps, conv_groups)
        self.encoder.layer_norm = nn.LayerNorm(width)
        self.encoder.layers = nn.ModuleList(Layer(width, hidden, num_heads, buckets, depth) for _ in range(depth))
        self.min_samples = BEATS_LOG_MEL.n_samples(_PATCH)
        self.max_samples = BEATS_LOG_MEL.n_samples(_PATCH * _MAX_COLUMNS)

    @property
    def native_window(self) -> tuple[int, int]:
        return self.max_samples, _MAX_COLUMNS * _HOP

    def columns(self, n_samples: int) -> list[int]:
        return in_pieces(BEATS_LOG_MEL.n_frames(max(n_samples, self.min_samples)) // _PATCH, _MAX_COLUMNS)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        """Pieces overlap by what the last frame of the filterbank needs beyond its hop, so that all frames are seen."""
        for a, b in spans.tolist():
            window = padded(clip[a:b], 0, max(b - a, self.min_samples))
            for i, columns in enumerate(self.columns(b - a)):
                begin = i * _MAX_COLUMNS * _HOP
                yield window[begin : begin + BEATS_LOG_MEL.n_samples(_PATCH * columns)]

    def front_end(self, waves: Tensor) -> Tensor:
        return ops.log_mel(waves, BEATS_LOG_MEL)

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        for tokens in self.tokens(inputs):
            yield tokens.unflatten(1, (-1, _ROWS)).float().mean(2)

    def features(self, waves: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The official `extract_features` of a batch of unequal clips, in one forward pass.

        `embed` needs none of it: it never pads one clip to the length of another.

        Args:
            waves: (N, S) float32 at 16 kHz, padded at the end.
            padding: (N, S) bool, True where a sample is padding. Officially a token is padding where all of its even
                share of the samples are, in the order of tokens: the eight bands of a patch have shares of their own.

        Returns:
            Tokens of the last layer (N, S // 2560 * 8, D), and (N, S // 2560 * 8) bool, True where one is padding.

        Raises:
            AudioError: shapes that do not fit, waves shorter than a patch, or a clip of padding alone.
        """
        if waves.ndim != 2 or waves.shape != padding.shape or padding.dtype != torch.bool:
            raise AudioError(
                f"features: waves are {tuple(waves.shape)}, padding is {tuple(padding.shape)} {padding.dtype}; "
                "expected (clips, samples) twice, padding bool"
            )
        if waves.shape[1] < self.min_samples:
            raise AudioError(f"features: waves of {waves.shape[1]} samples; a patch needs {self.min_samples}")
        with torch.autocast(self.device.type, enabled=False):
            fbank = self.front_end(waves)
        masked = padding
        for count in (fbank.shape[2], fbank.shape[2] // _PATCH * _ROWS):  # of filterbank frames, then of tokens
            masked = masked[:, : masked.shape[1] // count * count].unflatten(1, (count, -1)).all(2)
        if masked.all(1).any():
            raise AudioError("features: a clip is all padding; leave it out")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            *_, tokens = self.tokens(fbank, ~masked)
        return tokens.float(), masked

    def tokens(self, fbank: Tensor, keep: Tensor | None = None) -> Iterator[Tensor]:
        """(N, 128, T) normalised filterbank -> each layer's tokens (N, T // 16 * 8, D), in the order of time.

        keep: (N, T // 16 * 8) bool, the tokens that are audio; the others are not attended to.
        """
        x = self.patch_embedding(fbank.transpose(1, 2)[:, None])  # (N, embed, T // 16, 8)
        x = self.post_extract_proj(self.layer_norm(x.flatten(2).transpose(1, 2)))
        if keep is not None:
            x = x * keep[:, :, None]
        x = self.encoder.layer_norm(x + self.encoder.pos_conv(x))  # type: ignore[operator]
        layers: list[Layer] = list(self.encoder.layers)  # type: ignore[arg-type]
        bias = self.bias(layers[0].self_attn.relative_attention_bias, x.shape[1])
        for layer in layers:
            x = layer(x, bias, keep)
            yield x

    def bias(self, table: nn.Embedding, n: int) -> Tensor:
        """(H, n, n) from the buckets of the distances: exact up to a quarter of the table, then logarithmic."""
        position = torch.arange(n, device=table.weight.device)
        distance = position[None] - position[:, None]
        half = table.num_embeddings // 2
        exact = half // 2
        far = torch.log(distance.abs().clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        bucket = half * (distance > 0) + torch.where(distance.abs() < exact, distance.abs(), far)
        return table(bucket).permute(2, 0, 1)


def from_official(
    state: Mapping[str, Tensor],
    source: str,
    num_heads: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Beats:
    """A BEATs whose sizes are read off the shapes; the head of a fine-tuned one is left out.

    Args:
        state: weights under their official names.
        source: begins the messages of errors.
        num_heads: by default the configuration's, or else one attention head for every 64 channels.
        config: the official "cfg", where the file has one: heads, the greatest distance of positions, and the form.

    Raises:
        CheckpointError: no BEATs, one of an unknown form, or entries that are missing, left over or of another shape.
    """
    config = config or {}
    first = "encoder.layers.0."
    with recognised("BEATs", state, source):
        embed = state["patch_embedding.weight"].shape[0]
        hidden, width = state[first + "fc1.weight"].shape
        _, per_group, taps = state["encoder.pos_conv.0.weight_v"].shape
        buckets = state[first + "self_attn.relative_attention_bias.weight"].shape[0]
    for key, expected in _FORM.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"{source}: BEATs with {key} {config[key]!r}; only {expected!r} is supported")
    heads = checkpoint.heads_by_rule(width, num_heads or config.get("encoder_attention_heads"))
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.layers.")})
    distance = int(config.get("max_distance", _MAX_DISTANCE))
    with torch.device("meta"):
        model = Beats(embed, width, hidden, depth, heads, taps, width // per_group, buckets, distance)
    fill(model, state, source, _HEADS)
    return model


def load(argument: str, device: torch.device, dtype: torch.dtype, num_heads: int | None = None) -> Network:
    """`load_encoder("beats:FILE")`; without a file untrained, for costs and as a floor."""
    if argument:
        state, metadata = checkpoint.load(argument)
        model = from_official(state, argument, num_heads, metadata.get("cfg"))
        return model.ready(device, dtype, os.path.basename(argument))
    with seeded(0), in_float32(), torch.device("cpu"):
        model = Beats(num_heads=num_heads or 12)
    return model.ready(device, dtype, "beats, untrained")
