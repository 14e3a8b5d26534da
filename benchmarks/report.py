"""Tables for the README from recorded results, and comparisons of two of them.

    python benchmarks/report.py                       print the tables of the newest result of every device
    python benchmarks/report.py --readme              put them into README.md, between its two markers
    python benchmarks/report.py --compare OLD NEW     ratios of two results of one device

`sheet.py` makes the results. A result of a changed tree, of a failing stage or without tests is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- benchmarks: begin, made by benchmarks/report.py -->", "<!-- benchmarks: end -->"
Result = dict[str, Any]


def read(path: Path) -> Result:
    """A recorded result, or exit with what is wrong with it."""
    result = json.loads(path.read_text())
    wrong = [f"{name} ended with {code}" for name, code in result["exit_codes"].items() if code]
    if result["changes"]:
        wrong.append(f"the tree had changes: {', '.join(result['changes'][:3])}")
    if "tests" not in result["exit_codes"]:
        wrong.append("no test was run")
    if wrong:
        sys.exit(f"{path}: refused: {'; '.join(wrong)}")
    return result


def newest() -> list[Path]:
    """The newest result of every device."""
    return [max(folder.glob("*.json"), key=lambda p: json.loads(p.read_text())["date"]) for folder in devices()]


def devices() -> list[Path]:
    return sorted(folder for folder in (HERE / "results").glob("*") if any(folder.glob("*-*.json")))


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] + ["--:"] * (len(heads) - 1), *rows)] + [""]


def tables(result: Result) -> list[str]:
    versions = result["versions"]
    lines = [
        f"**{result['device']}**, {result['threads']} threads, torch {versions['torch']}, commit "
        f"`{result['commit'][:9]}`, {result['date'][:10]}, by `{result['command']}`:",
        "",
    ]
    if "ops" in result:
        lines += op_table(result["ops"])
    if "step" in result:
        step = result["step"]
        rows = [
            [
                name,
                f"{row['ms']:,.0f}",
                f"{row['crops_per_s']:.2f}",
                f"{row['gflop_per_s']:,.0f}",
                f"{row['speedup']:.2f}×",
            ]
            for name, row in step["rows"].items()
        ]
        head = f"training step, {step['preset']}, batch {step['batch_size']}"
        lines += table([head, "ms", "crops/s", "GFLOP/s", f"over {step['speedup_over']}"], rows)
    if "embed" in result:
        rows = result["embed"]["rows"]
        bases = [name.removeprefix("over ") for name in rows[0] if name.startswith("over ")]
        cells = [
            [f"{row['clips']} × {row['seconds']:g} s, {row['variant']}", f"{row['ms']:,.0f}"]
            + [f"{row[f'over {base}']:.2f}×" if f"over {base}" in row else "" for base in bases]
            for row in rows
        ]
        lines += table([f"embedding, {result['embed']['encoder']}", "ms", *(f"over {base}" for base in bases)], cells)
    if "temporal_support" in result:
        found = result["temporal_support"]
        heads = [f"temporal support, {found['preset']}, batch {found['batch_size']}"]
        heads += ["ms a clip", "ms a second", "peak MiB", "GMAC a clip", "GMAC a second"]
        rows = [
            [f"{row['kind']}, {row['seconds']:g} s"]
            + [f"{row[c]:,.1f}" for c in ("ms", "ms_per_second", "peak_mib", "gmacs", "gmacs_per_second")]
            for row in found["rows"]
        ]
        lines += table(heads, rows)
    if result["left_out"]:
        lines += ["Left out: " + "; ".join(result["left_out"].values()) + ".", ""]
    return lines


def op_table(ops: list[Result]) -> list[str]:
    references = {(row["op"], row["size"]): row["median_ms"] for row in ops if row["variant"] == "reference"}
    rows = []
    for row in ops:
        reference = references.get((row["op"], row["size"]))
        work, unit = (row["flops"], "GFLOP/s") if row["flops"] else (row["bytes"], "GB/s")
        rows.append(
            [
                f"`{row['op']}` {row['size']}, {row['variant']}",
                f"{row['median_ms']:.3g}",
                f"{work / row['median_ms'] / 1e6:.3g} {unit}",
                f"{row['floor_ms'] / row['median_ms']:.0%}",
                f"{reference / row['median_ms']:.2f}×" if reference else "",
                "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}",
            ]
        )
    return table(["op", "ms", "rate", "of floor", "over reference", "extra MiB"], rows)


def timings(result: Result) -> dict[str, float]:
    """Milliseconds by name, of everything that was timed."""
    found = {f"{row['op']} {row['size']} {row['variant']}": row["median_ms"] for row in result.get("ops", [])}
    found |= {f"step {name}": row["ms"] for name, row in result.get("step", {"rows": {}})["rows"].items()}
    for row in result.get("embed", {"rows": []})["rows"]:
        found[f"embed {row['clips']} x {row['seconds']:g} s {row['variant']}"] = row["ms"]
    for row in result.get("temporal_support", {"rows": []})["rows"]:
        found[f"{row['kind']} at {row['seconds']:g} s"] = row["ms"]
    return found


def compare(old: Result, new: Result) -> list[str]:
    """How many times as fast the new one is, of everything that both have timed."""
    if old["device"] != new["device"]:
        sys.exit(f"results of different devices do not compare: {old['device']} and {new['device']}")
    before, after = timings(old), timings(new)
    both = [name for name in after if name in before]
    lines = [f"{old['commit'][:9]} -> {new['commit'][:9]} on {new['device']}: times as fast"]
    lines += [f"{before[name] / after[name]:>8.2f}x  {name}" for name in both]
    ratios = sorted(before[name] / after[name] for name in both)
    if ratios:
        lines.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    if options.compare:
        print("\n".join(compare(*map(read, options.compare))))
        return
    lines = [line for path in newest() for line in tables(read(path))]
    if not lines:
        sys.exit(f"no result under {HERE / 'results'}; python benchmarks/sheet.py makes one")
    if not options.readme:
        print("\n".join(lines))
        return
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{readme} lacks the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"{END}{after}")


if __name__ == "__main__":
    main()
