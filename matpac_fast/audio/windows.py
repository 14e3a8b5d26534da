"""Windows: which stretches of a clip an embedding sees."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError

REMAINDERS = ("keep", "pad", "merge", "drop")


def windows(n_samples: int, size: int, hop: int, remainder: str = "keep") -> np.ndarray:
    """Spans of `size` samples every `hop`, over a clip of `n_samples`: (W, 2) int64, start and end.

    A clip no longer than `size` is one window. What is left after the last whole window and not yet covered is, by
    `remainder`:

    - "keep": a shorter window of its own, from the next hop to the end of the clip;
    - "pad": the same, of full size, so its span reaches past the end, where the caller pads with zeros;
    - "merge": added to the last whole window, which becomes longer;
    - "drop": left out (a clip shorter than `size` is still one window).

    Raises:
        ConfigError: a size, hop or remainder that cannot be.
    """
    if n_samples < 1 or size < 1 or hop < 1:
        raise ConfigError(f"windows: clip {n_samples}, size {size}, hop {hop} samples; expected at least 1 of each")
    if remainder not in REMAINDERS:
        raise ConfigError(f"windows: remainder is {remainder!r}; expected one of {', '.join(REMAINDERS)}")
    if n_samples <= size:
        return np.array([[0, size if remainder == "pad" else n_samples]], dtype=np.int64)
    starts = np.arange(0, n_samples - size + 1, hop, dtype=np.int64)
    spans = np.stack([starts, starts + size], axis=1)
    begin = int(starts[-1]) + hop
    if spans[-1, 1] >= n_samples or begin >= n_samples:
        return spans
    if remainder == "merge":
        spans[-1, 1] = n_samples
    elif remainder != "drop":
        tail = [begin, begin + size if remainder == "pad" else n_samples]
        spans = np.concatenate([spans, np.array([tail], dtype=np.int64)])
    return spans
