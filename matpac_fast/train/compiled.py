"""The transformer blocks through torch.compile: fused norms, GELU and residual sums; nothing changes but rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..model import Matpac

# One graph for each kind of block (student's, teacher's without gradient, predictor's, its last) and length of crop;
# past dynamo's own limit of 8 it would go on uncompiled.
_GRAPHS = 64


def blocks(model: Matpac) -> list[nn.Module]:
    """Every transformer block of the model."""
    return [*model.student.blocks, *model.teacher.blocks, *model.predictor.blocks]


def compile_blocks(model: Matpac, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block on its first call for each shape; blocks of one kind share a graph, so depth costs nothing."""
    import torch._dynamo.config as config  # seconds to import

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6 has the latter
    setattr(config, limit, max(_GRAPHS, getattr(config, limit)))
    for block in blocks(model):
        block.compile(backend=backend, fullgraph=True, dynamic=False)
