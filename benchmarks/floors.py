"""What each op must at least read, write and compute: the one place where bytes and FLOPs are counted.

A floor is the time in which a machine could do no more than this. Every tensor counts once, however often an
implementation touches it; a product of (m, k) and (k, n) is 2 m n k FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    bytes: int
    flops: int = 0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor, of whichever is the narrower."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def log_mel(clips: int, samples: int, n_mels: int, frames: int, in_bytes: int = 4, out_bytes: int = 4) -> Work:
    """Read the waves, write the mels; its arithmetic is by the transform chosen and far below."""
    return Work(clips * (in_bytes * samples + out_bytes * n_mels * frames))


def mask_shuffle(batch: int, tokens: int) -> Work:
    """Read an index a row, write int64 permutations."""
    return Work(8 * batch * (tokens + 1))


def masked_patch_embed(
    batch: int, mels: int, frames: int, width: int, visible: int, patch: int = 16, backward: bool = False
) -> Work:
    """One product over all patches and one write of both outputs, a CLS row in each, in float32.

    Backwards the visible patches are read again, their gradient once, and one product makes the weight's gradient.
    """
    tokens = (mels // patch) * (frames // patch)
    spec, out = 4 * batch * mels * frames, 4 * batch * (tokens + 2) * width
    bytes_, flops = spec + out, 2 * batch * tokens * patch**2 * width
    if backward:
        bytes_ += spec * visible // tokens + 4 * batch * (1 + visible) * width
        flops += 2 * batch * visible * patch**2 * width
    return Work(bytes_, flops)


def prototype_loss(rows: int, prototypes: int, features: int, itemsize: int = 4) -> Work:
    """Forward and backward from features: the logits of both sides, and the student's two gradients."""
    return Work(itemsize * 3 * (rows + prototypes) * features, 4 * 2 * rows * prototypes * features)


def prediction_loss(rows: int, width: int, heads: int = 1, backward: bool = False) -> Work:
    """Read the heads' predictions and the target; backwards once more, and write the predictions' gradient; float32."""
    read = 4 * rows * width * (heads + 1)
    return Work(2 * read + 4 * rows * width * heads if backward else read)


def attention(batch: int, tokens: int, heads: int, width: int, itemsize: int = 2) -> Work:
    """Forward and backward: read queries, keys and values and write the output; read all four and the output's
    gradient, and write three gradients. Seven products of (tokens, tokens) and (tokens, width) a head."""
    return Work(itemsize * batch * tokens * heads * width * (4 + 8), 7 * 2 * batch * heads * tokens**2 * width)


def bias_gelu(rows: int, columns: int, itemsize: int = 2) -> Work:
    """Forward and backward: read and write; read twice and write."""
    return Work(5 * itemsize * rows * columns)


def add_layer_norm(rows: int, width: int) -> Work:
    """Forward and backward, a float32 residual stream and 16-bit layers: read x and delta, write the sum and its norm;
    read the sum and both gradients, and write those of x and delta."""
    return Work(rows * width * (4 + 2 + 4 + 2 + 4 + 4 + 2 + 4 + 2))
