"""Tables for the README from recorded results, and comparisons of two of them.

    python benchmarks/report.py                       print the tables of the newest result of every device
    python benchmarks/report.py --readme              put them into docs/benchmarks.md, the curves of temporal support
                                                      beside it, and the short of the newest CPU's and the newest GPU's
                                                      into README.md, between its markers
    python benchmarks/report.py --compare OLD NEW     ratios of two results of one device, with their spread

`sheet.py` makes the results. A result of a changed tree, of a failing stage or without tests is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import _options
import _plots

HERE = Path(__file__).parent
BEGIN, END = "<!-- benchmarks: begin, made by benchmarks/report.py -->", "<!-- benchmarks: end -->"
_REFERENCES = ("reference", "compiled reference")
OURS = ("cuda", "triton", "cpp", "by hand")  # of these the first that was timed is what serves an op
PAGE = """# Benchmarks

The newest result of every device, whole. Made by `python benchmarks/report.py --readme` from `benchmarks/results/`,
which `python benchmarks/sheet.py` fills. "Of floor" is the least time that the bytes or products would take on this
device, over the time taken (`benchmarks/floors.py`); "extra" is the memory that a call takes beyond its arguments and
results; the first call is that of a new process, with what it compiles. A GPU's ops and attention are timed on the
device, calls back to back; "host" is the time in which the host hands one on, which is the longer of small ones.
In results older than commit 83ee5db the official code ran on this package's attention kernel: ours is further over it
than they say.
"""
Result = dict[str, Any]


def read(path: Path) -> Result:
    """A recorded result, or exit with what is wrong with it."""
    result = json.loads(path.read_text())
    codes = {name: code for name, code in result["exit_codes"].items() if name != "sanitizer"}  # told, not a reason
    wrong = [f"{name} ended with {code}" for name, code in codes.items() if code]
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


def made_by(result: Result) -> list[str]:
    command = re.sub(r" --out \S+", "", result["command"])  # a folder of the machine that ran it
    return [
        f"**{result['device']}**, {result['threads']} threads, torch {result['versions']['torch']}, commit "
        f"`{result['commit'][:9]}`, {result['date'][:10]}, by `{command}`:",
        "",
    ]


def short(result: Result) -> list[str]:
    """For the README: what serves each op against its rivals, the step, and embedding."""
    lines = made_by(result)
    rows = []
    for op, size in dict.fromkeys((row["op"], row["size"]) for row in result.get("ops", [])):
        timed = {row["variant"]: row for row in result["ops"] if (row["op"], row["size"]) == (op, size)}
        ours = next((timed[name] for name in OURS if name in timed), None)
        if ours is None:
            continue
        over = {name: f"{speedup(ours, row):.1f}×" for name, row in timed.items()}
        others = [f"{name} {ratio}" for name, ratio in over.items() if name not in (*OURS, *_REFERENCES)]
        cells = [f"`{op}` {size}", f"{ours['median_ms']:.3g}", f"{ours['floor_ms'] / ours['median_ms']:.0%}"]
        rows.append([*cells, *(over.get(name, "") for name in _REFERENCES), ", ".join(others)])
    if rows:
        lines += table(["op", "ms", "of floor", *(f"over {name}" for name in _REFERENCES), "over others"], rows)
    return lines + step_table(result) + embed_table(result)


def speedup(row: Result, other: Result) -> float:
    """How many times the seconds of `row` those of `other` are: the median of their turns' ratios, where they took
    turns, which results before 2026-11-29 did not."""
    return row.get("over", {}).get(other["variant"], other["median_ms"] / row["median_ms"])


def step_table(result: Result) -> list[str]:
    if "step" not in result:
        return []
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
    return table([head, "ms", "crops/s", "GFLOP/s", f"over {step['speedup_over']}"], rows)


def attention_table(result: Result) -> list[str]:
    if "attention" not in result:
        return []
    found = result["attention"]
    rows = [
        [
            f"{row['part']}, {row['tokens']} tokens, {row['backend']}",
            f"{row['ms']:.3g}",
            f"{row['ms'] * row['layers']:.3g}",
            f"{row['speedup']:.2f}×",
        ]
        for row in found["rows"]
    ]
    head = f"attention, {found['preset']}, batch {found['batch_size']}, {found['precision']}"
    return table([head, "ms", "ms a step", "over default"], rows)


def embed_table(result: Result) -> list[str]:
    if "embed" not in result:
        return []
    rows = result["embed"]["rows"]
    bases = [name.removeprefix("over ") for name in rows[0] if name.startswith("over ")]
    cells = [
        [f"{row['clips']} × {row['seconds']:g} s, {row['variant']}", f"{row['ms']:,.0f}"]
        + [f"{row[f'over {base}']:.2f}×" if f"over {base}" in row else "" for base in bases]
        for row in rows
    ]
    return table([f"embedding, {result['embed']['encoder']}", "ms", *(f"over {base}" for base in bases)], cells)


def tables(result: Result) -> list[str]:
    """All of a result."""
    lines = made_by(result)
    if "ops" in result:
        lines += op_table(result["ops"])
    lines += step_table(result) + attention_table(result) + embed_table(result)
    if "temporal_support" in result:
        lines += support_table(result["temporal_support"])
    if profile := result.get("profile"):
        lines += ["A training step of `base` taken apart, by `matpac-fast bench --profile`:", ""]
        lines += ["```", *profile, "```", ""]
    if (code := result["exit_codes"].get("sanitizer")) is not None:
        lines += [f"compute-sanitizer ended with {code}: {result['sanitizer']}.", ""]
    if result["left_out"]:
        lines += ["Left out: " + "; ".join(result["left_out"].values()) + ".", ""]
    return lines


def support_table(found: Result) -> list[str]:
    """Of the fastest backend and the largest batch that was timed; the JSON and the curves have the rest."""
    batch = max(row["batch_size"] for row in found["rows"])
    heads = [f"temporal support, {found['preset']}, batch {batch}"]
    heads += ["ms a clip", "ms a second", "peak MiB", "GMAC a clip", "GMAC a second", "largest batch"]
    columns = ("ms", "ms_per_second", "peak_mib", "gmacs", "gmacs_per_second")
    rows = [
        [f"{row['kind']}, {row['seconds']:g} s", *(f"{row[c]:,.1f}" for c in columns), row["largest_batch"]]
        for row in sorted(found["rows"], key=lambda row: row["kind"])
        if row["backend"] == found["rows"][0]["backend"] and row["batch_size"] == batch
    ]
    return table(heads, rows)


def op_table(ops: list[Result]) -> list[str]:
    references = {(row["op"], row["size"]): row for row in ops if row["variant"] == "reference"}
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
                f"{speedup(row, reference):.2f}×" if reference else "",
                "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}",
                f"{row['first_call_ms']:,.0f}" if "first_call_ms" in row else "",
                *([f"{row['host_ms']:.3g}"] if "host_ms" in row else []),
            ]
        )
    heads = ["op", "ms", "rate", "of floor", "over reference", "extra MiB", "first call, ms"]
    return table(heads + ["host, ms"] * any("host_ms" in row for row in ops), rows)


Times = tuple[float, float, float]  # median, lower and upper quartile, ms


def timings(result: Result) -> dict[str, Times]:
    """By name, of everything that was timed."""
    found = {}
    for row in result.get("ops", []):
        found[f"{row['op']} {row['size']} {row['variant']}"] = (row["median_ms"], *row["spread_ms"])
    for name, row in result.get("step", {"rows": {}})["rows"].items():
        found[f"step {name}"] = (row["ms"], *row["spread_ms"])
    for row in result.get("attention", {"rows": []})["rows"]:
        found[f"attention {row['part']} {row['backend']}"] = (row["ms"], *row["spread_ms"])
    for row in result.get("embed", {"rows": []})["rows"]:
        found[f"embed {row['clips']} x {row['seconds']:g} s {row['variant']}"] = (row["ms"], *row["spread_ms"])
    for row in result.get("temporal_support", {"rows": []})["rows"]:
        name = f"{row['kind']} {row['batch_size']} x {row['seconds']:g} s {row['backend']}"
        found[name] = (row["ms"], *row["spread_ms"])
    return found


def compare(old: Result, new: Result) -> list[str]:
    """How many times as fast the new one is, of everything that both have timed.

    Behind each ratio of the medians, the ratios of opposite quartiles: where 1 lies between, the two do not differ.
    """
    if old["device"] != new["device"]:
        sys.exit(f"results of different devices do not compare: {old['device']} and {new['device']}")
    before, after = timings(old), timings(new)
    both = [name for name in after if name in before]
    lines = [f"{old['commit'][:9]} -> {new['commit'][:9]} on {new['device']}: times as fast, and between which ratios"]
    for name in both:
        (median, low, high), (median_now, low_now, high_now) = before[name], after[name]
        least, most = low / high_now, high / low_now
        same = "  no difference" if least <= 1 <= most else ""
        lines.append(f"{median / median_now:>8.2f}x  ({least:.2f} to {most:.2f})  {name}{same}")
    ratios = sorted(before[name][0] / after[name][0] for name in both)
    if ratios:
        lines.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}")
    return lines


def curves(path: Path, result: Result) -> list[str]:
    """Draw the curves of a result into docs/, and say where; nothing where it has none."""
    if "temporal_support" not in result:
        return []
    image = HERE.parent / "docs" / f"temporal-support-{path.parent.name}.png"
    image.parent.mkdir(exist_ok=True)
    _plots.temporal_support(result["temporal_support"], image)
    return [f"![Time, memory and largest batch against temporal support]({image.name})", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    parser.add_argument("--compare", nargs=2, type=_options.there, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    if options.compare:
        print("\n".join(compare(*map(read, options.compare))))
        return
    found = {path: read(path) for path in newest()}
    lines = [line for result in found.values() for line in tables(result)]
    if not lines:
        sys.exit(f"no result under {HERE / 'results'}; python benchmarks/sheet.py makes one")
    if not options.readme:
        print("\n".join(lines))
        return
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{readme} lacks the lines {BEGIN} and {END}")
    in_readme, page = [], [PAGE]
    # Of CPUs, which have no driver, and of GPUs: in order of date, the last one stays.
    latest = {bool(found[path].get("driver")): path for path in sorted(found, key=lambda p: found[p]["date"])}.values()
    for path, result in found.items():
        drawn = curves(path, result)
        page += tables(result) + drawn
        if path in latest:
            in_readme += short(result) + [line.replace("](", "](docs/") for line in drawn]
    (HERE.parent / "docs").mkdir(exist_ok=True)
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(page))
    readme.write_text(f"{before}{BEGIN}\n\n" + "\n".join(in_readme) + f"{END}{after}")


if __name__ == "__main__":
    main()
