"""Linear layers, by whichever of torch's libraries multiplies faster on this CPU, and with their GELU."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from .. import ops
from ..backend import dtype_of_products, fuses, prefers_onednn, transformed
from ..ops._onednn import onednn_linear

# Multiply-adds, below which oneDNN's product gains less than calling it takes.
_LEAST = 20_000_000


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to read the weights of `module` is to call it: a `kind` and none of its subclasses, as LoRA, FSDP and
    parametrizations make them, neither hooked, compiled nor wrapped, with its own forward pass, as off-loading and
    checkpointing replace it, and with its weights here and whole."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        modules._global_forward_hooks,  # of every module, as register_module_forward_hook makes them
        modules._global_forward_pre_hooks,
        modules._global_backward_hooks,
        modules._global_backward_pre_hooks,
    )
    if type(module) is not kind or any(hooks) or module._compiled_call_impl is not None:
        return False
    # In a graph, torch 2.6 finds nothing in the dictionary.
    if "forward" in module.__dict__ or not isinstance(module.forward, types.MethodType):
        return False
    return not any(hasattr(weight, "to_local") for weight in module._parameters.values())  # FSDP's


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output; in float32, where oneDNN multiplies faster than what torch takes by itself, by oneDNN."""
    return onednn_linear(x, layer.weight, layer.bias) if _takes_onednn(layer, x) else layer(x)


def linear_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """The exact GELU of a linear layer's output; its bias is added with it where a kernel does both."""
    dtype = dtype_of_products(x)
    if dtype.itemsize == 2 and is_plain(layer, nn.Linear) and layer.bias is not None:
        elements = x.numel() // max(1, layer.in_features) * layer.out_features
        if fuses("bias_gelu", x.device, dtype, elements):
            return ops.bias_gelu(F.linear(x, layer.weight), layer.bias)
    return F.gelu(linear(layer, x))


def _takes_onednn(layer: nn.Linear, x: Tensor) -> bool:
    if not prefers_onednn(x.device) or is_watched() or not is_plain(layer, nn.Linear):
        return False
    # Of tensors the plain ones alone: no quantised weights or other subclasses.
    plain = type(x) is Tensor and type(layer.weight) is nn.Parameter
    floats = dtype_of_products(x) == x.dtype == layer.weight.dtype == torch.float32
    return plain and floats and x.numel() * layer.out_features >= _LEAST


def is_watched() -> bool:
    """Whether something transforms, traces or counts what runs, and so wants to see the products that torch knows."""
    if transformed():
        return True
    # torch.compile knows the operator.
    return not torch.compiler.is_compiling() and (torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0)
