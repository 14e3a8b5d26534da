"""Any installed package that speaks the HEAR 2021 API as an encoder: OpenL3, BYOL-A, wav2vec 2 and dozens more.

`load_encoder("hear:MODULE")` imports MODULE, which runs its code, and asks its `load_model()` for a model;
`load_encoder("hear:MODULE:WEIGHTS")` hands WEIGHTS, a path or whatever MODULE takes, to `load_model`. A window is
embedded whole, whatever its length, by `get_scene_embeddings`; `pool="none"` gives `get_timestamp_embeddings`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import numbers
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..audio_encoder import AudioEncoder
from ..errors import CheckpointError, ConfigError
from ..files import sha256

_log = logging.getLogger("matpac_fast")
_FUNCTIONS = ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")
_ATTRIBUTES = ("sample_rate", "scene_embedding_size", "timestamp_embedding_size")
_PROBE_SECONDS = 2.0
_ANY = (Exception, SystemExit)  # another package's code may fail in any way, sys.exit among them


class HearEncoder(AudioEncoder):
    """A model of a HEAR module; what the API does not tell is found by asking it.

    The shortest window is the fewest samples for which the module gives finite numbers. There are frame embeddings
    where scene and timestamp embeddings have one size and the timestamps of two seconds of noise, in milliseconds, come
    at one distance; a frame is told to start `frame_samples` after the one before, the first at 0.

    Args:
        module: the name of one with the functions of the API.
        model: what its `load_model` gave.
        settings: what beside the model's weights decides the embeddings.

    Raises:
        CheckpointError: a model without the attributes of the API, or which embeds nothing of up to two seconds.
    """

    beyond = "embedded whole, as the module does"

    def __init__(self, module: str, model: Any, settings: dict[str, Any]):
        super().__init__()
        sizes = {name: getattr(model, name, None) for name in _ATTRIBUTES}
        if missing := [name for name, size in sizes.items() if not isinstance(size, numbers.Integral)]:
            raise CheckpointError(f"hear:{module}: the model has no whole number {', '.join(missing)}")
        self.settings = settings
        self.model = model  # a torch module's weights become this one's
        self._module = module  # by name: modules can be neither pickled nor copied
        self._counted: dict[int, int] = {}  # samples -> timestamps
        self.sample_rate, self.embedding_dim = int(model.sample_rate), int(model.scene_embedding_size)
        # Without weights that torch knows, this is what tells the device.
        self.register_buffer("anchor", torch.empty(0, device="cpu"), persistent=False)

    def probe(self) -> HearEncoder:
        """Find the shortest window and the frames, on the device where the model is."""
        longest = round(_PROBE_SECONDS * self.sample_rate)
        # Not of silence, which some modules divide by its peak.
        noise = torch.randn(1, longest, generator=torch.Generator().manual_seed(0)).to(self.device) / 10
        fails, works = 0, 1
        while problem := self._problem(noise[:, :works]):
            if works == longest:
                raise CheckpointError(
                    f"hear:{self._module}: gives no embedding of {_PROBE_SECONDS:g} s of noise: {problem}"
                )
            fails, works = works, min(2 * works, longest)
        while works - fails > 1:
            middle = (fails + works) // 2
            fails, works = (middle, works) if self._problem(noise[:, :middle]) else (fails, middle)
        self.min_samples = works
        self.settings = self.settings | {"min_samples": works}  # shorter windows are padded to it
        if self.model.timestamp_embedding_size == self.embedding_dim:
            try:
                _, times = self._timestamps(noise)
            except _ANY as error:  # scenes are embedded all the same
                _log.info("hear:%s: no frame embeddings: %s: %s", self._module, type(error).__name__, error)
                return self
            if len(times) > 1 and times[-1] < 10 * _PROBE_SECONDS:  # a hundredth of what was heard
                _log.info(
                    "hear:%s: no frame embeddings: timestamps of %g s end at %g; the API has milliseconds",
                    self._module,
                    _PROBE_SECONDS,
                    times[-1].item(),
                )
                return self
            steps = times.diff() * self.sample_rate / 1000
            if len(steps) and (steps - steps[0]).abs().max() < 1 and round(steps[0].item()) > 0:
                self.frame_samples = round(steps[0].item())
                self.frame_middle = times[0].item() * self.sample_rate / 1000
        return self

    def _problem(self, wave: Tensor) -> str:
        """Why there is no scene embedding of `wave`, "" where there is one."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                finite = torch.isfinite(self._scene(wave)).all()
        except _ANY as error:  # as on what is too short for it
            return f"{type(error).__name__}: {error}"
        return "" if finite else "NaN or infinite numbers"

    def rows(self, n_samples: int) -> list[int]:
        """The API does not tell, so silence of that length is asked, once."""
        n = max(n_samples, self.min_samples)
        if n not in self._counted:
            with torch.no_grad():
                self._counted[n] = self._timestamps(torch.zeros(1, n, device=self.device))[0].shape[1]
        return [self._counted[n]]

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        if pool == "mean":
            return self._scene(pieces)[:, None]
        frames, _ = self._timestamps(pieces)
        (expected,) = self.rows(pieces.shape[1])
        if frames.shape[1] != expected:
            raise CheckpointError(
                f"hear:{self._module}: {frames.shape[1]} timestamps for {pieces.shape[1]} samples, and "
                f"{expected} for as much silence; expected a number that depends on the length alone"
            )
        return frames[:, None]

    def _scene(self, waves: Tensor) -> Tensor:
        found = self._ask("get_scene_embeddings", waves)
        return self._checked(found, (len(waves), self.embedding_dim), "get_scene_embeddings")

    def _timestamps(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, T, E), and (T,) float64 the milliseconds of the first wave's."""
        found, times = self._ask("get_timestamp_embeddings", waves)
        times = np.asarray(times.detach().cpu() if isinstance(times, Tensor) else times, np.float64)
        shape = (len(waves), times.shape[-1], self.embedding_dim)
        return self._checked(found, shape, "get_timestamp_embeddings"), torch.from_numpy(np.atleast_2d(times)[0])

    def _ask(self, function: str, waves: Tensor) -> Any:
        audio: Any = waves
        tensorflow: Any = sys.modules.get("tensorflow")
        if isinstance(self.model, getattr(tensorflow, "Module", ())):  # these take its own tensors, as in heareval
            audio = tensorflow.convert_to_tensor(waves.cpu().numpy())
        return getattr(importlib.import_module(self._module), function)(audio, self.model)

    def _checked(self, found: Any, shape: tuple[int, ...], what: str) -> Tensor:
        if not isinstance(found, Tensor) and hasattr(found, "__array__"):  # numpy's, TensorFlow's
            found = torch.from_numpy(np.array(found))
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"hear:{self._module}: {what} gave {came}; expected a tensor {shape}")
        return found.to(self.device, torch.float32)


def load(argument: str, device: torch.device, dtype: torch.dtype) -> AudioEncoder:
    """`load_encoder("hear:MODULE")` or `load_encoder("hear:MODULE:WEIGHTS")`.

    Raises:
        ConfigError: no module, or bfloat16.
        CheckpointError: a module that cannot be imported, lacks the API, or loads no model.
    """
    name, _, weights = argument.partition(":")
    if not name:
        raise ConfigError("hear: expected hear:MODULE or hear:MODULE:WEIGHTS, such as hear:openl3_hear")
    if dtype != torch.float32:
        raise ConfigError(f"hear:{name}: it computes in its own dtype; got {dtype}, expected float32")
    try:
        module = importlib.import_module(name)
    except _ANY as error:
        raise CheckpointError(
            f"hear:{name}: the module cannot be imported ({type(error).__name__}: {error}); install the package that "
            "has it"
        ) from error
    if missing := [function for function in _FUNCTIONS if not callable(getattr(module, function, None))]:
        raise CheckpointError(f"hear:{name}: the module has no {', '.join(missing)}, so it does not speak the HEAR API")
    try:
        model = module.load_model(weights) if weights or _asks_for_one(module.load_model) else module.load_model()
    except _ANY as error:
        raise CheckpointError(f"hear:{argument}: load_model failed: {type(error).__name__}: {error}") from error
    if isinstance(model, nn.Module):
        model = model.to(device).requires_grad_(False).eval()
    encoder = HearEncoder(name, model, _settings(name, module, weights)).to(device).eval()
    encoder.name = f"hear:{argument}"
    with torch.no_grad():
        return encoder.probe()  # type: ignore[operator] # Module.to and eval are typed as Module's


def _asks_for_one(load_model: Callable[..., Any]) -> bool:
    """Whether the file's path has no default, as the API has it; many modules with one model leave it unread."""
    try:
        inspect.signature(load_model).bind()
    except TypeError:
        return True
    return False


def _settings(name: str, module: ModuleType, weights: str) -> dict[str, Any]:
    """The module, its package's version and its file, and the content of weights that are a file or a folder."""
    settings: dict[str, Any] = {"kind": "hear", "module": name, "weights": weights}
    top = name.partition(".")[0]
    told = [importlib.metadata.version(p) for p in importlib.metadata.packages_distributions().get(top, ())]
    if module.__file__:  # a package that is being written changes under one version
        told.append(sha256(module.__file__))
    settings["version"] = ",".join(told)
    if os.path.isfile(weights):
        settings["weights"] = sha256(weights)
    elif os.path.isdir(weights):  # as TensorFlow's
        inside = sorted(path for path in Path(weights).rglob("*") if path.is_file())
        settings["weights"] = [(path.relative_to(weights).as_posix(), sha256(path)) for path in inside]
    return settings
