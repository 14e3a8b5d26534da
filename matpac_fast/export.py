"""The encoder as one graph from waves to embeddings, for ONNX Runtime or torch.export, at any batch and length."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from . import reference
from .errors import ConfigError
from .files import atomic
from .nn.vit import Attention, Block
from .vit_encoder import Encoder

_TOLERANCE = 1e-4  # of the embeddings' deviation; rounding makes some 1e-6


class Exportable(nn.Module):
    """(B, S) float32 waves at the encoder's rate -> (B, E): one embedding a clip, as `Encoder.embed` gives them.

    The log-mel is three matrix products: the frames by the windowed DFT, their power by the mel bank. A clip longer
    than the encoder's `n_frames` is cut into pieces of that, the last one padded and its padding masked out of the
    attention and the mean, so that one graph without branches serves every length from `n_fft` samples up.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"export: {encoder.name} is a {type(encoder).__name__}; expected a MATPAC or M2D encoder")
        for dtype in (encoder.dtype, encoder.weights_dtype):
            if dtype != torch.float32:
                raise ConfigError(f"export: the encoder is in {dtype}; load it in float32")
        config = encoder.log_mel_config
        if config.framing == "kaldi" or config.preemphasis or config.log_floor:
            raise ConfigError(
                "export: the encoder's log-mel has Kaldi's framing, pre-emphasis or a floor; expected none"
            )
        self.encoder, self.config = encoder, config
        window, bank = reference.mel_window(config) * config.gain, reference.mel_bank(config)
        used = bank.any(0).nonzero()[:, 0]  # the bins that some filter sees
        turn = torch.arange(config.n_fft, device="cpu")[:, None] * used % config.n_fft
        angle = 2 * torch.pi / config.n_fft * turn.double()
        dft = torch.cat([angle.cos(), angle.sin()], dim=1) * window[:, None]
        self.register_buffer("dft", dft.float())  # (n_fft, 2 * bins)
        self.register_buffer("bank", bank[:, used].T.contiguous().float())  # (bins, n_mels)

    dft: Tensor
    bank: Tensor

    def forward(self, waves: Tensor) -> Tensor:
        encoder, patch = self.encoder, self.encoder.patch_size
        most = encoder.n_frames // patch
        spec = self.log_mel(waves)  # (B, T, F)
        columns = (spec.shape[1] + patch - 1) // patch
        size = _opaque(torch.sym_min(columns, most), most)  # columns in a piece
        count = _opaque((columns + size - 1) // size)  # pieces in a clip

        # Gathered by index rather than padded and reshaped: no shape then has to divide another.
        column = torch.arange(size, device=waves.device)
        frame = torch.arange(count, device=waves.device)[:, None] * size + column
        counts = frame < columns  # (count, size)
        frame = frame[:, :, None] * patch + torch.arange(patch, device=waves.device)  # (count, size, patch)
        inside = (frame < spec.shape[1])[..., None]
        cut = spec[:, frame.clamp(max=spec.shape[1] - 1)] * inside  # (B, count, size, patch, F)
        cut = cut.unflatten(-1, (encoder.freq, patch)).permute(0, 1, 4, 2, 5, 3)  # (B, count, freq, size, p, p)
        proj = encoder.frontend.patch_embed.proj
        assert proj.bias is not None
        pos = encoder.frontend.pos_embed
        grid = pos[0, 1:].unflatten(0, (encoder.freq, -1))[:, column]  # (freq, size, D)
        tokens = cut.flatten(4) @ proj.weight.flatten(1).T + (grid + proj.bias)
        cls = (encoder.frontend.cls_token + pos[:, :1]).expand(waves.shape[0], count, -1, -1)
        x = torch.cat([cls, tokens.flatten(2, 3)], dim=2).flatten(0, 1)  # (B * count, N, D)

        seen = torch.cat([counts.new_ones(count, 1), counts[:, None].expand(-1, encoder.freq, -1).flatten(1)], dim=1)
        mask = seen.expand(waves.shape[0], -1, -1).flatten(0, 1).unsqueeze(1).unsqueeze(1)  # (B * count, 1, 1, N)
        for block in cast("list[Block]", list(encoder.student.blocks)):
            x = x + self._attention(block.attn, block.norm1(x), mask)
            x = x + block.mlp(block.norm2(x))
        x = encoder.student.norm(x).narrow(1, 1, encoder.freq * size)
        x = x.unflatten(0, (waves.shape[0], count)).unflatten(2, (encoder.freq, size))
        kept = (x * counts[:, None, :, None]).sum(dim=(1, 3))  # (B, freq, D)
        return kept.flatten(1) / columns

    def log_mel(self, waves: Tensor) -> Tensor:
        """(B, S) -> (B, T, n_mels)."""
        config = self.config
        if self.encoder.centered:
            waves = F.pad(waves, (config.n_fft // 2, config.n_fft // 2), mode="reflect")
        n_frames = _opaque((waves.shape[1] - config.n_fft) // config.hop + 1)
        first = torch.arange(n_frames, device=waves.device)[:, None] * config.hop
        frames = waves[:, first + torch.arange(config.n_fft, device=waves.device)]  # (B, T, n_fft)
        real, imag = (frames @ self.dft).chunk(2, dim=2)  # (B, T, bins)
        mel = (real * real + imag * imag) @ self.bank
        return (torch.log(mel + config.log_offset) - config.mean) / config.std

    def _attention(self, attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
        """`Attention.forward` with a mask of the keys that count."""
        b, n, d = x.shape
        qkv = attention.qkv(x).reshape(b, n, 3, attention.num_heads, d // attention.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D/H)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return attention.proj(out.transpose(1, 2).reshape(b, n, d))


def to_program(encoder: Encoder) -> torch.export.ExportedProgram:
    """`Exportable` through torch.export: (B, S) float32, S from `min_samples` up, -> (B, E)."""
    model = Exportable(encoder).to(encoder.device).eval()
    waves = torch.zeros(2, 3 * encoder.n_frames * encoder.log_mel_config.hop // 2, device=encoder.device)
    batch = torch.export.Dim("batch", min=1, max=65_536)  # torch 2.6 needs a bound
    samples = torch.export.Dim("samples", min=encoder.min_samples)
    return torch.export.export(model, (waves,), dynamic_shapes={"waves": {0: batch, 1: samples}}, strict=False)


def export_torch(encoder: Encoder, path: str | os.PathLike[str]) -> float:
    """Write a .pt2 for torch.export.load, all of it or none; returns the largest error of `check`."""
    packed = io.BytesIO()  # torch aborts the process where a write fails
    torch.export.save(to_program(encoder), packed, extra_files={"matpac_fast.json": json.dumps(_about(encoder))})
    with atomic(path) as beside:
        beside.write_bytes(packed.getbuffer())
        with open(beside, "rb") as file:  # what was written is checked, not what is in memory
            return check(encoder, torch.export.load(cast(Any, file)).module())


def can_onnx() -> bool:
    """Whether torch's exporter takes graphs whose sizes depend on each other."""
    return TorchVersion(torch.__version__) >= "2.8"


def export_onnx(encoder: Encoder, path: str | os.PathLike[str]) -> float:
    """Write one .onnx file, weights within, all of it or none; returns the largest error of `check`.

    Input "waves" (batch, samples) float32, output "embeddings" (batch, E). The metadata under "matpac_fast" say
    sample_rate, embedding_dim, min_samples and the encoder's id.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is missing, or torch is older than 2.8, whose exporters fail.
    """
    if not can_onnx():
        raise ConfigError(f"ONNX export needs torch 2.8 or later; this is {torch.__version__}: --torch does without")
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ConfigError(f"ONNX export needs {error.name}: pip install 'matpac_fast[export]'") from error
    program = torch.onnx.export(
        to_program(encoder), input_names=["waves"], output_names=["embeddings"], dynamo=True, verbose=False
    )
    assert program is not None
    model = program.model_proto
    _name_dimensions(model.graph)
    onnx.helper.set_model_props(model, {"matpac_fast": json.dumps(_about(encoder))})
    model.doc_string = takes(encoder)
    with atomic(path) as beside:
        beside.write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
        return check(encoder, lambda waves: torch.from_numpy(session.run(None, {"waves": waves.cpu().numpy()})[0]))


def _name_dimensions(graph: Any) -> None:
    """The tracer's symbols for the dynamic dimensions -> names that tell."""
    symbols = [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim]
    names = dict(zip(symbols, ("batch", "samples"), strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def check(encoder: Encoder, run: Callable[[Tensor], Tensor]) -> float:
    """The largest error of `run` against `encoder.embed` over several lengths and batches, the embeddings' deviation 1.

    Raises:
        ConfigError: it is above 1e-4, more than rounding can be; or the encoder's own embeddings are not finite.
    """
    native = encoder.n_frames * encoder.log_mel_config.hop
    rng = np.random.default_rng(0)
    worst = 0.0
    for batch, samples in ((1, encoder.min_samples), (3, native // 3), (1, native + 240), (2, 2 * native + 777)):
        waves = torch.from_numpy(rng.standard_normal((batch, samples), dtype=np.float32) / 10).to(encoder.device)
        want = encoder.embed(waves, encoder.sample_rate).values[:, 0].cpu()
        if not want.isfinite().all():
            raise ConfigError(
                "export: the encoder's own embeddings of noise are not finite, so its weights are spoilt; not written: "
                "load an earlier checkpoint"
            )
        error = float((run(waves).cpu() - want).abs().max() / want.std())
        if not error <= _TOLERANCE:  # NaN too
            raise ConfigError(
                f"export: the exported graph is off by {error:.1e} of the embeddings' deviation; not written"
            )
        worst = max(worst, error)
    return worst


def takes(encoder: Encoder) -> str:
    """What the file takes and what it does not, in a sentence."""
    least = f"{encoder.min_samples} samples ({1000 * encoder.min_samples / encoder.sample_rate:g} ms)"
    return (
        f"takes waves (batch, samples), float32 mono at {encoder.sample_rate} Hz, of {least} or more; "
        "pad a shorter one with zeros at its end"
    )


def _about(encoder: Encoder) -> dict[str, Any]:
    names = ("sample_rate", "embedding_dim", "min_samples", "id", "name")
    return {name: getattr(encoder, name) for name in names}


def _opaque(n: Any, most: int | None = None) -> int:
    """`n`, hidden from the tracer, which would else make special cases of 0 and 1 and refuse the general one."""
    n = cast(int, torch.scalar_tensor(n, dtype=torch.int64, device="cpu").item())  # no int(): that would pin it
    torch._check(n >= 1)
    if most is not None:
        torch._check(n <= most)
    return n
