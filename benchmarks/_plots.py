"""The curves of a result, as PNG; matplotlib is imported only to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Of Okabe and Ito, which colour-blind people tell apart.
COLOURS = {"auto": "#0072b2", "reference": "#d55e00", "cpp": "#009e73", "cuda": "#cc79a7", "triton": "#e69f00"}
DASHES = ("--", "-", ":", "-.")
PANELS = {
    "ms": "ms a clip",
    "ms_per_second": "ms a second of audio",
    "peak_mib": "peak memory, MiB",
    "largest_batch": "largest batch",
}


def temporal_support(found: dict[str, Any], path: Path) -> None:
    """Embedding above, training below; a colour a backend, and a dash a batch size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    rows = found["rows"]
    batches = sorted({row["batch_size"] for row in rows})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(len(kinds), len(PANELS), figsize=(4 * len(PANELS), 3.2 * len(kinds)), squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        for axis, (name, label) in zip(line, PANELS.items(), strict=True):
            for backend in dict.fromkeys(row["backend"] for row in rows):
                # The largest batch is one a temporal support, whichever batch was timed.
                for batch in batches[-1:] if name == "largest_batch" else batches:
                    mine = [r for r in rows if (r["kind"], r["backend"], r["batch_size"]) == (kind, backend, batch)]
                    values = [float(str(r[name]).lstrip("~>")) for r in mine]
                    style = {"ls": DASHES[batches.index(batch) % len(DASHES)], "c": COLOURS[backend], "ms": 3}
                    axis.plot([r["seconds"] for r in mine], values, "o", label=f"{backend}, batch {batch}", **style)
            axis.set(xscale="log", yscale="log", xlabel="temporal support, s", title=f"{kind}: {label}")
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_xticks([0.1, 0.3, 1, 3, 10, 30])
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_formatter("{x:g}")
                scale.set_minor_formatter(matplotlib.ticker.NullFormatter())
        line[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{found['preset']}, {found['device']}, torch {found['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
