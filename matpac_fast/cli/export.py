"""`matpac-fast export`: an encoder as one ONNX or torch.export file, from waves to embeddings."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from ..errors import ConfigError
from ..weights import DEFAULT


def main(
    encoder: str = DEFAULT, onnx: Path | None = None, torch: Path | None = None, num_heads: int | None = None
) -> int:
    """Export an encoder, log-mel included, and check the file against PyTorch at several lengths.

    Example: matpac-fast export --encoder runs/a --onnx encoder.onnx

    The file takes waves (batch, samples), float32 mono at the encoder's sample rate, and gives one embedding a clip
    (batch, E), for any batch and any length from 25 ms up.

    Args:
        encoder: MATPAC's or M2D's: a run folder, or of it runs/a@teacher, runs/a@20000 or runs/a@layer6, a checkpoint,
            an official file, or a name such as m2d:FILE. Default: this package's own pre-trained one.
        onnx: write this ONNX file; it needs pip install 'matpac_fast[export]', and torch 2.8 or later.
        torch: write this file for torch.export.load.
        num_heads: attention heads of an official checkpoint, which does not tell them. Default: the width / 64.
    """
    if onnx is None and torch is None:
        raise ConfigError("nothing to export: give --onnx FILE, --torch FILE or both")
    from ..encoder import load_encoder
    from ..export import export_onnx, export_torch, takes
    from ..vit_encoder import Encoder

    loaded = load_encoder(encoder, "cpu", num_heads)
    if not isinstance(loaded, Encoder):
        raise ConfigError(f"{encoder} is a {type(loaded).__name__}; only MATPAC and M2D encoders can be exported")
    # torch's exporters remark on packages that they could do without, and on torch's own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for path, export in ((onnx, export_onnx), (torch, export_torch)):
        if path is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = export(loaded, path)
            size = f"{path.stat().st_size / 2**20:.1f} MiB"
            print(f"{path}: {size}; off from PyTorch by at most {error:.1e} of the embeddings' standard deviation")
    print(takes(loaded))
    return 0
