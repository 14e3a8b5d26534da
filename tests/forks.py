"""Processes that start at once: forked by a server that has imported everything already.

There is one server for the whole suite, and it imports what the first to start it asked for: so all ask for the same.
"""

from __future__ import annotations

import multiprocessing

_PRELOAD = [
    "matpac_fast.embed",
    "matpac_fast.train",
    "pyarrow.parquet",
    "safetensors.torch",
    "soundfile",
    "soxr",
    # What torch imports only when it is used.
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
]


def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context
