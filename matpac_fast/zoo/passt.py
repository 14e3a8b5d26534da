"""PaSST (2110.05069): a supervised ViT on overlapping patches of a 32 kHz log-mel, with two tokens for the whole.

`load_encoder("passt:FILE")` takes the official checkpoints at any stride, `load_encoder("passt")` is untrained PaSST-S.
A window's embedding is the mean of the two tokens, the official "features". A model has positions for ten seconds, or
as many as its file says; a longer window is averaged over pieces of that, where the official code cuts it off.
Facts from kkoutini/passt_hear21 and PaSST: models/passt.py, models/preprocess.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .. import checkpoint, ops
from ..errors import CheckpointError
from ..nn.initial import in_float32, seeded
from ..nn.vit import Block
from ..reference import LogMelConfig
from .network import Network, fill, recognised

# hear21passt's, without the augmentation of its filters' range.
PASST_LOG_MEL = LogMelConfig(
    sample_rate=32_000,
    n_fft=1024,
    win_length=800,
    hop=320,
    n_mels=128,
    f_min=0.0,
    f_max=15_000.0,
    log_offset=1e-5,
    mean=-4.5,
    std=5.0,
    bank="kaldi",
    window="hann_symmetric",
    framing="center",
    preemphasis=0.97,
)
_PATCH = 16
# Rows of overlapping patches on 128 mels -> the stride.
_STRIDES = {(PASST_LOG_MEL.n_mels - _PATCH) // stride + 1: stride for stride in (10, 12, 14, 16, 20)}
_HEADS = ("head.", "head_dist.", "pre_logits.")


class Passt(Network):
    """PaSST under its official parameter names.

    Args:
        width, depth, num_heads, mlp_ratio: of the transformer.
        rows, max_columns: of the grid of patches that it has positions for.
    """

    sample_rate = PASST_LOG_MEL.sample_rate

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        rows: int = 12,
        max_columns: int = 99,
        mlp_ratio: int = 4,
    ):
        super().__init__()
        self.settings = {"kind": "passt", "num_heads": num_heads}
        self.stride = _STRIDES[rows]
        self.embedding_dim, self.n_layers = width, depth
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, max_columns))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, width, _PATCH, self.stride)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.min_samples = PASST_LOG_MEL.n_samples(_PATCH)
        # The first wave that would have a column more.
        self.max_samples = PASST_LOG_MEL.n_samples(_PATCH + self.stride * max_columns) - 1

    def frames(self, n_samples: int) -> int:
        """Columns of patches: what a piece weighs."""
        return (PASST_LOG_MEL.n_frames(n_samples) - _PATCH) // self.stride + 1

    def front_end(self, waves: Tensor) -> Tensor:
        return ops.log_mel(waves, PASST_LOG_MEL)

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        columns = (inputs.shape[-1] - _PATCH) // self.stride + 1
        for tokens in self.tokens(inputs):
            # One embedding a piece stands for as many frames as the piece weighs.
            yield tokens[:, :2].float().mean(1, keepdim=True) * columns

    def tokens(self, mel: Tensor) -> Iterator[Tensor]:
        """(N, 128, T) normalised log-mel -> each block's tokens (N, 2 + rows * columns, D), the last normalised."""
        x = self.patch_embed.proj(mel[:, None])  # type: ignore[operator] # (N, D, rows, columns)
        x = x + self.time_new_pos_embed[..., : x.shape[-1]] + self.freq_new_pos_embed
        first = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        x = torch.cat([first.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            yield self.norm(x) if i + 1 == len(self.blocks) else x


def from_official(state: Mapping[str, Tensor], source: str, num_heads: int | None = None) -> Passt:
    """A PaSST whose sizes are read off the shapes, with one attention head for every 64 channels unless given.

    The classification heads are left out.

    Raises:
        CheckpointError: no PaSST, or entries that are missing, left over or of another shape.
    """
    with recognised("PaSST", state, source):
        width, rows = state["freq_new_pos_embed"].shape[1:3]
        max_columns = state["time_new_pos_embed"].shape[3]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    if rows not in _STRIDES:
        known = ", ".join(map(str, _STRIDES))
        raise CheckpointError(f"{source}: PaSST with {rows} rows of patches; expected one of {known}")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    heads = checkpoint.heads_by_rule(width, num_heads)
    with torch.device("meta"):
        model = Passt(width, depth, heads, rows, max_columns, hidden // width)
    fill(model, state, source, _HEADS)
    return model


def load(argument: str, device: torch.device, dtype: torch.dtype, num_heads: int | None = None) -> Network:
    """`load_encoder("passt:FILE")`; without a file untrained, for costs and as a floor."""
    if argument:
        model = from_official(checkpoint.load(argument)[0], argument, num_heads)
        return model.ready(device, dtype, os.path.basename(argument))
    with seeded(0), in_float32(), torch.device("cpu"):
        model = Passt(num_heads=num_heads or 12)
        for name, position in model.named_parameters():
            if name.endswith(("_token", "pos_embed")):
                nn.init.trunc_normal_(position, std=0.02)
    return model.ready(device, dtype, "passt, untrained")
