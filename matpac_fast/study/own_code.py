"""What an encoder is besides weights: its class, what it computes in, and the source of classes that are not ours."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys

import torch

from ..audio_encoder import AudioEncoder


def class_name(encoder: AudioEncoder) -> str:
    return f"{type(encoder).__module__}.{type(encoder).__qualname__}"


def dtype_name(encoder: AudioEncoder) -> str:
    """What it computes in, whatever was asked for: some have float32 alone."""
    return str(getattr(encoder, "dtype", torch.float32)).removeprefix("torch.")


def own_code(encoder: AudioEncoder) -> str:
    """SHA-256 of the source of an encoder's classes, without those whose package's version is told already; "" of none.

    An encoder that is being written changes under one name, with the weights and settings that it had.
    """
    kinds = {kind for module in encoder.modules() for kind in type(module).__mro__}
    sources = sorted(filter(None, map(_source, kinds)))
    return hashlib.sha256("\0".join(sources).encode()).hexdigest() if sources else ""


@functools.cache
def _source(kind: type) -> str | None:
    if kind.__module__.partition(".")[0] in {"torch", "matpac_fast", *sys.stdlib_module_names}:
        return None
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in at a prompt, or compiled
        return None
