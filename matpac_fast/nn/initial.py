"""Weights as they are made: torch's random state and default dtype belong to all threads, these to one alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWING = {"uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_", "randn"}
_MAKING = {"empty", "ones", "zeros", "randn"}


class seeded(TorchFunctionMode):
    """Within, weights are a function of `seed` alone; the global random state is neither read nor changed."""

    def __init__(self, seed: int):
        super().__init__()
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWING and kwargs.get("generator") is None:
            drawn = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            device = torch.empty(0, device=kwargs.get("device")).device if drawn is None else drawn.device
            if device.type != "meta":
                if device not in self._generators:
                    self._generators[device] = torch.Generator(device).manual_seed(self._seed)
                kwargs["generator"] = self._generators[device]
        return func(*args, **kwargs)


class in_float32(TorchFunctionMode):
    """Within, weights are float32, whatever the default dtype is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _MAKING and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)
