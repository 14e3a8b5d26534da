"""Matpac: the student-teacher model being pre-trained (MATPAC, arXiv 2502.12031; MATPAC++, 2508.12709)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint, ops
from .backend import autocast_dtype, without_autocast
from .config import MatpacConfig, stored_config
from .errors import CheckpointError, ConfigError
from .nn.ema import ema_update, linear_anneal
from .nn.frontend import Frontend
from .nn.heads import ClassificationHead
from .nn.initial import seeded
from .nn.predictor import Predictor
from .nn.statistics import Sums, added, summarise, token_sums
from .nn.vit import Transformer, init_weights
from .spans import span

# Statistics want probabilities, which the losses never hold whole: of so many bytes of prototypes' logits at a time.
_SUMS_BYTES = 2**26


class MatpacOutput(NamedTuple):
    """One step's losses: `loss` scalar, `loss_pred` and `loss_cls` (B * M,), one a masked token, B-major."""

    loss: Tensor
    loss_pred: Tensor
    loss_cls: Tensor
    sums: Sums | None

    @property
    def statistics(self) -> dict[str, Tensor] | None:
        """What the official code logs, where it was asked for (see nn/statistics.py)."""
        return None if self.sums is None else summarise(self.sums)


class Schedule(NamedTuple):
    """What the number of a step sets: as numbers, or as float64 scalars on the device, which a CUDA graph reads anew.

    `mcl_temp` is None without heads and the number 0 for the hard minimum; a decay of 1 moves nothing.
    """

    teacher_temp: float | Tensor
    mcl_temp: float | Tensor | None
    ema_decay: float | Tensor
    head_ema_decay: float | Tensor


class Matpac(nn.Module):
    """Student, teacher, predictor and classification heads, with the official step's arithmetic.

    One optimiser step is: `out = model(spec, step=step)`; `out.loss.backward()`; `model.update_teachers(step)`;
    clip; `optimizer.step()`. `update_teachers` comes before the optimiser because the official teachers average the
    weights that the step started from. Nothing here waits for the device.

    The initial weights are a function of `config.seed` alone; the global random state is left as it was.
    """

    def __init__(self, config: MatpacConfig = MatpacConfig()):
        super().__init__()
        self.config = c = config
        with seeded(c.seed):
            self.frontend = Frontend(c.width, c.patch_size, c.freq, c.time)
            self.student = Transformer(c.width, c.depth, c.num_heads, c.mlp_ratio)
            self.predictor = Predictor(
                c.predictor_width,
                c.width,
                c.predictor_depth,
                c.predictor_heads,
                c.mlp_ratio,
                c.freq,
                c.time,
                c.mcl_heads,
            )
            self.head = ClassificationHead(c.width, c.head_hidden, c.head_bottleneck, c.prototypes)
            self.teacher = Transformer(c.width, c.depth, c.num_heads, c.mlp_ratio)
            self.teacher_head = ClassificationHead(c.width, c.head_hidden, c.head_bottleneck, c.prototypes)
            self._init_weights()
        self.register_buffer("center", torch.zeros(c.prototypes))
        # Sum of the teacher's column means since the last update, and their number: the centre of one optimiser step,
        # also where its gradient was accumulated over several batches.
        self.register_buffer("center_sum", torch.zeros(c.prototypes), persistent=False)
        self.register_buffer("center_count", torch.zeros(()), persistent=False)
        self.register_load_state_dict_post_hook(_begin_sums)
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self._made = {name: tensor.to("meta") for name, tensor in self.state_dict().items()}  # names and shapes

    __call__: Callable[..., MatpacOutput]  # which torch calls Any
    center: Tensor
    center_sum: Tensor
    center_count: Tensor

    def _init_weights(self) -> None:
        self.student.apply(init_weights)
        self.teacher.apply(init_weights)
        for layer in self.head.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # Official order: the teacher's head copies the student's, then the student's MLP is initialised again.
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.head.mlp.apply(init_weights)
        if self.config.teacher_init == "copy":
            self.teacher.load_state_dict(self.student.state_dict())
            self.teacher_head.load_state_dict(self.head.state_dict())

    def forward(
        self,
        spec: Tensor,
        ids_shuffle: Tensor | None = None,
        step: int = 0,
        index: Tensor | None = None,
        statistics: bool = False,
        schedule: Schedule | None = None,
    ) -> MatpacOutput:
        """The two losses of one batch.

        Args:
            spec: (B, n_mels, T) normalised log-mel; T a multiple of the patch size, at most `n_frames`.
            ids_shuffle: (B, N) int64, a permutation of the N patches of each crop, the visible ones first. Without it
                the mask is `ops.mask_shuffle(config.seed, step, index, N)`.
            step: the optimiser step, from 0: it sets the temperatures.
            index: (B,) int64, the crop's number within the global batch; 0..B-1 by default.
            statistics: also sum up what a log wants to know; otherwise None.
            schedule: the temperatures, in place of those of `step`.

        In training mode the teacher's mean is kept for the next `update_teachers`.
        """
        c = self.config
        if spec.ndim != 3 or spec.shape[1] != c.n_mels or spec.shape[2] % c.patch_size or spec.shape[2] > c.n_frames:
            raise ConfigError(
                f"spec is {tuple(spec.shape)}; expected (B, {c.n_mels}, T) with T a multiple of {c.patch_size} "
                f"of at most {c.n_frames} frames"
            )
        n_tokens = c.freq * (spec.shape[2] // c.patch_size)
        n_visible = c.n_visible(n_tokens)
        if not 0 < n_visible < n_tokens:
            raise ConfigError(f"spec has {n_tokens} patches; a mask ratio of {c.mask_ratio} leaves {n_visible} visible")
        if ids_shuffle is None:
            if index is None:
                index = torch.arange(spec.shape[0], device=spec.device)
            ids_shuffle = ops.mask_shuffle(c.seed, step, index, n_tokens)

        schedule = schedule or self.schedule(step)
        with span("patch embedding"):
            visible, masked = self.frontend.split(spec, ids_shuffle, n_visible)
        with span("student"):
            latents = self.student(visible)
        with span("predictor"):
            prediction = self.predictor(latents, ids_shuffle).flatten(0, 1)  # (B*M, [H,] D)
        with torch.no_grad(), span("teacher"):
            target = self.teacher(masked)[:, 1:].flatten(0, 1)  # (B*M, D)

        with span("losses"):
            loss_pred, best = ops.prediction_loss(prediction, target, schedule.mcl_temp)
        # The classification branch takes the best head's guess of each token.
        guess = prediction
        if best is not None:
            guess = prediction.gather(1, best[:, None, None].expand(-1, 1, prediction.shape[-1])).squeeze(1)

        with span("heads"):
            features, matrix = self.head(guess), self.head.last_layer.matrix()
            with torch.no_grad():
                teacher_features, teacher_matrix = self.teacher_head(target), self.teacher_head.last_layer.matrix()
        with span("losses"):
            loss_cls, teacher_mean = ops.prototype_loss(
                _factor(features),
                _factor(matrix),
                _factor(teacher_features),
                _factor(teacher_matrix),
                self.center,
                c.student_temp,
                schedule.teacher_temp,
                mean_of=c.center_of,
            )
        if self.training:
            with torch.no_grad():
                self.center_sum += teacher_mean
                self.center_count += 1

        loss = (1 - c.classification_weight) * loss_pred.mean() + c.classification_weight * loss_cls.mean()
        sums = self._sums(prediction, target, features, teacher_features, schedule.teacher_temp) if statistics else None
        return MatpacOutput(loss, loss_pred, loss_cls, sums)

    @torch.no_grad()
    def update_teachers(self, step: int, skip: Tensor | None = None, schedule: Schedule | None = None) -> None:
        """Move the teachers and the centre once, after `forward` of optimiser step `step` and before the optimiser.

        The averages skip step 0, as official; the centre does not. Where `skip`, a bool scalar on the model's device,
        is true the step counts for nothing: teachers and centre stay as they are. The centre also stays where no
        forward pass in training mode came before, or one that was not finite. `schedule` gives the decays in place of
        those of `step`.
        """
        c = self.config
        schedule = schedule or self.schedule(step)
        mean = self.center_sum / self.center_count
        stays = ~mean.isfinite().all()  # of no pass it is 0 / 0
        self.center_sum.zero_()
        self.center_count.zero_()
        for teacher, student, decay in (
            (self.teacher, self.student, schedule.ema_decay),
            (self.teacher_head, self.head, schedule.head_ema_decay),
        ):
            if isinstance(decay, Tensor) or decay < 1:
                ema_update(teacher, student, decay, skip)
        center = c.center_momentum * self.center + (1 - c.center_momentum) * mean
        self.center.copy_(torch.where(stays if skip is None else stays | skip, self.center, center))

    def schedule(self, step: int) -> Schedule:
        """The temperatures and decays of optimiser step `step`, from 0."""
        return Schedule(
            self.teacher_temperature(step),
            self.mcl_temperature(step) if self.config.mcl_heads else None,
            self.ema_decay(step) if step > 0 else 1.0,
            self.head_ema_decay(step) if step > 0 else 1.0,
        )

    def teacher_temperature(self, step: int) -> float:
        c = self.config
        return linear_anneal(c.teacher_temp_start, c.teacher_temp, step, c.teacher_temp_warmup)

    def mcl_temperature(self, step: int) -> float:
        """Exponential decay; 0, the hard minimum, once it has fallen to `mcl_temp_end`."""
        temperature = self.config.mcl_temp_start * self.config.mcl_temp_decay**step
        return temperature if temperature > self.config.mcl_temp_end else 0.0

    def ema_decay(self, step: int) -> float:
        return linear_anneal(self.config.ema_start, self.config.ema_end, step, self.config.max_steps)

    def head_ema_decay(self, step: int) -> float:
        c = self.config
        if step >= c.max_steps and c.head_ema_past_end == "encoder" and c.head_ema_start != c.head_ema_end:
            return c.ema_end
        return linear_anneal(c.head_ema_start, c.head_ema_end, step, c.max_steps)

    @torch.no_grad()
    def _sums(
        self,
        prediction: Tensor,
        target: Tensor,
        features: Tensor,
        teacher_features: Tensor,
        teacher_temp: float | Tensor,
    ) -> Sums:
        sums: Sums = {}
        with without_autocast(features.device):  # what is measured is not to be the rounding
            matrix, teacher_matrix = (h.last_layer.matrix().float() for h in (self.head, self.teacher_head))
            rows = max(1, _SUMS_BYTES // (4 * len(matrix)))
            tensors = (prediction, target, features.float(), teacher_features.float())
            for predicted, latents, student, teacher in zip(*(t.split(rows) for t in tensors), strict=True):
                student_p = (student @ matrix.T / self.config.student_temp).softmax(-1)
                teacher_p = ((teacher @ teacher_matrix.T - self.center) / teacher_temp).softmax(-1)
                sums = added(sums, token_sums(predicted, latents, student_p, teacher_p))
        return sums

    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        num_heads: int | None = None,
        predictor_heads: int | None = None,
        **options: Any,
    ) -> Matpac:
        """Load a checkpoint of the official training code; every size is read from its content.

        Args:
            source: a fairseq checkpoint, or its "model" dictionary (teachers nested, or flat as "_ema.norm.weight").
            num_heads: of the encoders; by default one for every 64 channels, the official rule.
            predictor_heads: of the predictor, which the file does not say: 16 by default of the official width, 512; of
                another width they must be given.
            options: further fields of MatpacConfig, such as `max_steps`, which no checkpoint holds, or `n_frames`, for
                crops of another length than the checkpoint's.

        Raises:
            CheckpointError: unsafe, damaged, or entries missing or left over, which are listed; or a predictor of a
                width that does not tell its heads.
        """
        state = source if isinstance(source, Mapping) else checkpoint.load(source)[0]
        name = "the checkpoint" if isinstance(source, Mapping) else str(source)
        ours = checkpoint.from_official_names(state, name)
        sizes: dict[str, Any] = checkpoint.read_sizes(ours, name)
        sizes["num_heads"] = checkpoint.heads_by_rule(sizes["width"], num_heads)
        if "predictor_width" in sizes:  # else what is missing is listed
            sizes["predictor_heads"] = checkpoint.predictor_heads(sizes["predictor_width"], predictor_heads)
        model = cls(MatpacConfig(**{**sizes, **options}))
        if "n_frames" in options and model.config.n_mels == sizes["n_mels"]:
            own = model.state_dict()
            ours |= {table: own[table] for table in checkpoint.POSITIONS}
        checkpoint.load_into(model, ours, name)
        return model

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write weights, teachers and centre as safetensors, all of it or none; `extra`, such as a step, joins the
        metadata as JSON.

        The file's front end is that of `config`, by which it then embeds: whether the model was trained on such
        log-mels, `config.log_mel`, cannot be seen here.

        Raises:
            CheckpointError: layers were replaced or parametrized, so that nothing could read the file, or cut by FSDP.
        """
        state = checkpoint.state_to_save(self, self._made)
        checkpoint.save(path, state, {"kind": "model", "config": self.config.to_dict(), **extra})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Matpac:
        """Read what `save` wrote, or the newest checkpoint of a run folder.

        Raises:
            CheckpointError: no such file, damaged, or not written by `save`.
        """
        state, metadata = checkpoint.load(checkpoint.find_weights(path))
        config = stored_config(metadata, path)
        if config is None:
            raise CheckpointError(f"{path}: no training checkpoint of this package; is it official? Use from_official")
        model = cls(config)
        checkpoint.load_into(model, state, str(path))
        return model

    def official_state_dict(self) -> dict[str, Any]:
        """The state under the official names, teachers nested in `_ema` and `_cls_head_ema`, as fairseq saves it.

        Of the front end it tells the number of mels alone: what reads it takes MATPAC's.

        Raises:
            CheckpointError: as of `save`.
        """
        return checkpoint.to_official_names(checkpoint.state_to_save(self, self._made))


def _begin_sums(model: nn.Module, _: object) -> None:
    """What no checkpoint holds begins at zero, also in a model that was made without memory (on "meta")."""
    assert isinstance(model, Matpac)
    if model.center_sum.device != model.center.device:
        model.center_sum, model.center_count = torch.zeros_like(model.center), model.center.new_zeros(())
    model.center_sum.zero_()  # in place, as a CUDA graph knows it
    model.center_count.zero_()


def _factor(tensor: Tensor) -> Tensor:
    """What the prototypes' products multiply: under autocast on a GPU its 16 bits, for tensor cores make a float32
    logit of them in a twelfth of the time that float32 factors take. A CPU would only lose bits."""
    return tensor.to(autocast_dtype(tensor.device)) if tensor.is_cuda else tensor
