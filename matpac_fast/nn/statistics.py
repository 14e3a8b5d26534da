"""What a log wants to know of a step, as sums over its masked tokens: pieces and processes add theirs up.

So the statistics of a batch are the same in however many pieces and on however many ranks it was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sums = dict[str, Tensor]


@torch.no_grad()
def token_sums(prediction: Tensor, target: Tensor, student_p: Tensor, teacher_p: Tensor) -> Sums:
    """Sums over N masked tokens, float64, which take a difference of squares without loss.

    Args:
        prediction, target: latents (N, D), the prediction with MCL heads (N, H, D).
        student_p, teacher_p: (N, K) probabilities of the prototypes.
    """
    unit = torch.nn.functional.normalize
    latents = unit(target.float(), dim=-1)
    chosen, guessed = teacher_p.argmax(-1), student_p.argmax(-1)
    several = prediction.ndim == 3
    heads = prediction.float() if several else prediction.float()[:, None]
    double = latents.double()
    found = {
        "tokens": torch.full((), float(len(target)), dtype=torch.float64, device=target.device),
        "teacher_p": teacher_p.sum(0, dtype=torch.float64),
        "teacher_entropy": -(teacher_p * torch.log(teacher_p + 1e-7)).sum(dtype=torch.float64),
        "chosen": torch.zeros(teacher_p.shape[1], dtype=torch.float64, device=target.device).index_add_(
            0, chosen, torch.ones_like(chosen, dtype=torch.float64)
        ),
        "agreement": (chosen == guessed).sum(dtype=torch.float64),
        "gram": double.T @ double,  # (D, D)
        **_moments("target", latents),
        **_moments("student_p", student_p),
        **_moments("teacher_p", teacher_p),
        **_moments("index_teacher", chosen[:, None].double()),
        **_moments("index_student", guessed[:, None].double()),
    }
    for i, head in enumerate(unit(heads, dim=-1).unbind(1)):
        found |= _moments(f"prediction_{i}" if several else "prediction", head)
    return found


def added(sums: Sums, more: Sums) -> Sums:
    """Of the tokens of both; `sums` is empty where there are none yet."""
    return {name: value + sums[name] if sums else value for name, value in more.items()}


def _moments(name: str, rows: Tensor) -> Sums:
    """Sums over rows (N, C) of the values and of their squares, which float32 would round before they are added up."""
    exact = rows.double()
    return {f"{name}/sum": exact.sum(0), f"{name}/squares": exact.square().sum(0)}


def summarise(sums: Sums) -> dict[str, Tensor]:
    """What the official code logs, unscaled, float32 scalars: spreads near 0, or a perplexity near 1, mean collapse."""
    n = sums["tokens"]
    mean = sums["teacher_p"] / n

    def spread(name: str) -> Tensor:
        """Mean over columns of the standard deviation over rows (official `compute_var`)."""
        total, squares = sums[f"{name}/sum"], sums[f"{name}/squares"]
        variance = ((squares - total.square() / n) / (n - 1)).clamp_min(0)
        return torch.sqrt(variance + 1e-6).mean()

    found = {
        "spread_target": spread("target"),
        "spread_student_p": spread("student_p"),
        "spread_teacher_p": spread("teacher_p"),
        "teacher_entropy": sums["teacher_entropy"] / n,
        "teacher_perplexity": torch.exp(-(mean * torch.log(mean + 1e-7)).sum()),
        "prototypes_used": (sums["chosen"] > 0).sum(),
        "agreement": sums["agreement"] / n,
        "index_spread_teacher": spread("index_teacher"),
        "index_spread_student": spread("index_student"),
    }
    for name in sums:
        if name.startswith("prediction") and name.endswith("/sum"):
            found["spread_" + name.removesuffix("/sum")] = spread(name.removesuffix("/sum"))
    return {name: value.float() for name, value in found.items()}


def effective_rank(gram: Tensor) -> float:
    """RankMe (Garrido et al., 2210.02885) of latents Z (N, D) from gram = Z.T @ Z, float64: 1 to min(N, D).

    The exponential of the entropy of Z's singular values, each divided by their sum. Waits for the device.
    """
    if not gram.isfinite().all():
        return float("nan")
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum() + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))
