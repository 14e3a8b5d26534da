"""get_matpac: the official inference package's function, signature, outputs and layouts, on our encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .download import resolve
from .encoder import load_with_state
from .errors import CheckpointError, ConfigError
from .vit_encoder import Encoder

# Classes of the released probes whose clips have several labels (OpenMIC, FSD50K, the MTG-Jamendo sets), and of those
# with one (GTZAN, UrbanSound8K, NSynth). 50 classes are ESC-50 (one label) or MTG top 50 and MagnaTagATune (several).
_SEVERAL_LABELS = (20, 40, 56, 87, 200)
_ONE_LABEL = (10, 11)


class OfficialMatpac(nn.Module):
    """`model(x)` -> (emb, layer_results), as the official `matpac_wrapper` gives them.

    x is (S,), (B, S) or (B, 1, S) mono at the encoder's rate, 16 kHz: a tensor or array of floats in [-1, 1] or int16,
    checked as `Encoder.embed` checks it. With the time axis pulled, emb is (B, E) and layer_results
    (B, L, E); else (B, T, E) and (B, L, T, E). E is 3840 with `concat_freq`, 768 without.
    """

    __call__: Callable[..., tuple[Tensor, Tensor]]  # which torch calls Any

    def __init__(self, encoder: Encoder, inference_type: str, pull_time_dimension: bool, concat_freq: bool):
        super().__init__()
        self.encoder = encoder
        self.inference_type = inference_type
        self.pull_time_dimension = pull_time_dimension
        self.concat_freq = concat_freq
        self.head_norm: nn.BatchNorm1d | None = None
        self.head: nn.Linear | None = None
        self.multi_label = True
        self.class_names: Sequence[str] | None = None

    def forward(self, x: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        if self.inference_type == "fast":
            layers = self._fast(self._spec(x))
        else:
            layers = self._precise(self._spec(x), by_frame=self.head_norm is not None)
        emb = layers[:, -1]
        if self.pull_time_dimension:
            return emb.mean(1), layers.mean(2)
        return emb, layers

    def probe_forward(self, x: Tensor | np.ndarray) -> tuple[Tensor, list[list[str]]]:
        """Probabilities (B, classes), and the five most probable labels of each clip as "name (0.42)".

        Clips that may have several labels get a sigmoid each; only tasks of one label get a softmax. (The official
        package takes a softmax for all.) Without `class_names` a label is its index.
        """
        if self.head is None:
            raise ConfigError("probe_forward: no classification head; give as_class_head or probe_checkpoint_paths")
        emb = self._precise(self._spec(x), by_frame=self.head_norm is not None)[:, -1].mean(1)
        logits = self.head(emb if self.head_norm is None else self.head_norm(emb))
        probs = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        values, index = probs.topk(min(5, probs.shape[-1]), dim=-1)
        names = [str(i) for i in range(probs.shape[-1])] if self.class_names is None else self.class_names
        rows = zip(index.tolist(), values.tolist(), strict=True)
        return probs, [[f"{names[i]} ({v:.2f})" for i, v in zip(ix, vs, strict=True)] for ix, vs in rows]

    def _spec(self, x: Tensor | np.ndarray) -> Tensor:
        """(S,), (B, S) or (B, 1, S) -> (B, F, T)."""
        if isinstance(x, (Tensor, np.ndarray)) and x.ndim == 3 and x.shape[1] == 1:
            x = x[:, 0]
        waves = self.encoder.check_mono(x, "get_matpac: x")
        if isinstance(x, Tensor) and x.is_floating_point():
            waves = x.to(waves.dtype)  # what was checked is detached, also from forward mode's tangents
        waves = waves.to(self.encoder.device)
        return self.encoder.log_mel(waves.reshape(-1, waves.shape[-1])).to(self.encoder.weights_dtype)

    def _precise(self, spec: Tensor, by_frame: bool) -> Tensor:
        """Pieces of at most `n_frames`, the last one padded to whole patches only: (B, L, T, E)."""
        spec = F.pad(spec, (0, -spec.shape[-1] % self.encoder.patch_size))
        pieces = [self._arrange(piece, by_frame) for piece in spec.split(self.encoder.n_frames, dim=-1)]
        return torch.cat(pieces, dim=2)

    def _fast(self, spec: Tensor) -> Tensor:
        """Everything padded to whole pieces, which go through as one batch; padding stays in, time is in order."""
        spec = F.pad(spec, (0, -spec.shape[-1] % self.encoder.n_frames))
        n = spec.shape[-1] // self.encoder.n_frames
        body = spec.unflatten(-1, (n, self.encoder.n_frames)).transpose(1, 2).flatten(0, 1)  # (B * n, F, n_frames)
        found = self._arrange(body, by_frame=False).unflatten(0, (len(spec), n))  # (B, n, L, T, E)
        return found.transpose(1, 2).flatten(2, 3)

    def _arrange(self, spec: Tensor, by_frame: bool) -> Tensor:
        """One piece through every block: (B, L, T, freq * D); unconcatenated (B, L, freq * T, D), frequency-major; or,
        `by_frame`, the mean over frequency (B, L, T, D), which the AudioSet head was trained on."""
        found = []
        for tokens in self.encoder.student.layers(self.encoder.frontend(spec)):
            grid = tokens[:, 1:].unflatten(1, (self.encoder.freq, -1))  # (B, freq, T, D)
            if self.concat_freq:
                found.append(grid.transpose(1, 2).flatten(2))
            else:
                found.append(grid.mean(1) if by_frame else grid.flatten(1, 2))
        return torch.stack(found, dim=1)


def get_matpac(
    checkpoint_path: str | os.PathLike[str],
    inference_type: str = "precise",
    pull_time_dimension: bool = True,
    concat_freq: bool = True,
    as_class_head: bool = False,
    probe_checkpoint_paths: str | os.PathLike[str] | None = None,
    *,
    num_heads: int | None = None,
    device: str | torch.device | None = None,
    multi_label: bool | None = None,
    class_names: Sequence[str] | Mapping[str, int] | None = None,
) -> OfficialMatpac:
    """The official package's `get_matpac`, for any encoder that `load_encoder` reads.

    Args:
        checkpoint_path: a released or trained checkpoint, or its https:// address; size, grid and head are read from
            its content.
        inference_type: "precise", the one that the paper's results use; or "fast", which pads every clip to whole
            pieces and averages the padding in, as the official code does.
        pull_time_dimension: average over time.
        concat_freq: concatenate the patches of a column (3840 numbers) rather than give a sequence of patches (768).
        as_class_head: attach the AudioSet head that the checkpoint holds, for `probe_forward`; like the official code
            this sets the options it was trained with: precise, not concatenated, pooled.
        probe_checkpoint_paths: a linear probe, one weight and one bias, for `probe_forward`; sets precise,
            concatenated, pooled.
        num_heads: attention heads, for sizes off the rule of 64 channels a head.
        device: by default CUDA where there is one.
        multi_label: whether clips may have several labels. Of a probe read off the number of classes where that tells,
            of the AudioSet head true; false there gives the official softmax.
        class_names: the classes' names, in the head's order, or each one's place in it.

    Raises:
        CheckpointError: a file that is missing, damaged, unsafe or lacks what was asked for.
        ConfigError: an option that cannot be.
    """
    if inference_type not in ("precise", "fast"):
        raise ConfigError(f"get_matpac: inference_type is {inference_type!r}; expected 'precise' or 'fast'")
    if as_class_head and probe_checkpoint_paths is not None:
        raise ConfigError("get_matpac: as_class_head and probe_checkpoint_paths are two heads; expected one of them")
    for name, given in (("class_names", class_names), ("multi_label", multi_label)):
        if given is not None and not as_class_head and probe_checkpoint_paths is None:
            raise ConfigError(f"get_matpac: {name} without a head; give as_class_head or probe_checkpoint_paths too")
    encoder, state = load_with_state(checkpoint_path, device, num_heads)
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"get_matpac: {encoder.name} is a {type(encoder).__name__}; expected a MATPAC encoder")
    if as_class_head and encoder.depth < encoder.sizes["depth"]:
        raise ConfigError(
            f"get_matpac: the AudioSet head is of the last layer, and this is {encoder.name}; leave it out"
        )
    if as_class_head or probe_checkpoint_paths is not None:
        inference_type, pull_time_dimension, concat_freq = "precise", True, not as_class_head
    model = OfficialMatpac(encoder, inference_type, pull_time_dimension, concat_freq)
    if as_class_head:
        _attach_audioset_head(model, state, os.fspath(checkpoint_path))
        model.multi_label = multi_label is not False
    elif probe_checkpoint_paths is not None:
        _attach_probe(
            model, checkpoint.load(probe := resolve(os.fspath(probe_checkpoint_paths)))[0], probe, multi_label
        )
    if model.head is not None and class_names is not None:
        given = len(class_names)
        if isinstance(class_names, Mapping):
            places = {place: name for name, place in class_names.items()}
            class_names = [places[i] for i in range(given) if i in places]
        if not len(class_names) == given == model.head.out_features:
            raise ConfigError(
                f"get_matpac: {given} class names for {model.head.out_features} classes; expected one of each: a list, "
                "or each one's place from 0 on"
            )
        model.class_names = class_names
    return model.to(encoder.device).eval().requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _attach_audioset_head(model: OfficialMatpac, state: dict[str, Tensor], source: str) -> None:
    names = ("head.weight", "head.bias", "head_norm.running_mean", "head_norm.running_var")
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(f"{source}: no AudioSet head: {', '.join(missing)} missing")
    weight, bias, mean, var = (state[name] for name in names)
    model.head = _linear(weight, bias)
    model.head_norm = nn.BatchNorm1d(len(mean), affine=False)
    model.head_norm.load_state_dict({"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(0)})


def _attach_probe(model: OfficialMatpac, state: dict[str, Any], source: str, multi_label: bool | None) -> None:
    tensors = [t for t in state.values() if isinstance(t, Tensor)]
    weights, biases = ([t for t in tensors if t.ndim == ndim] for ndim in (2, 1))
    if len(weights) != 1 or len(biases) != 1 or weights[0].shape[0] != len(biases[0]):
        kinds = ((name, tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__) for name, t in state.items())
        shapes = ", ".join(f"{name} {kind}" for name, kind in kinds)
        raise CheckpointError(f"{source}: expected one linear layer's weight and bias, found {shapes}")
    if weights[0].shape[1] != model.encoder.embedding_dim:
        raise CheckpointError(
            f"{source}: a probe of {weights[0].shape[1]} inputs, on an encoder of {model.encoder.embedding_dim}"
        )
    classes = len(biases[0])
    if multi_label is None:
        if classes not in _SEVERAL_LABELS + _ONE_LABEL:
            raise ConfigError(
                f"{source}: {classes} classes do not tell whether a clip has one label or several: give multi_label"
            )
        multi_label = classes in _SEVERAL_LABELS
    model.head = _linear(weights[0], biases[0])
    model.multi_label = multi_label
