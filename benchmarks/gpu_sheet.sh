#!/usr/bin/env bash
# One command on a machine with a GPU, under ten minutes and without a network: build, the GPU tests, compute-sanitizer
# where there is one, the op benchmarks, and one JSON of it all.
#
#   benchmarks/gpu_sheet.sh              into benchmarks/results/<device>/<date>-<commit>.json, logs beside it in $OUT
#   benchmarks/gpu_sheet.sh --dry-run    no build, one op, whatever device is here: checks this script itself
#
# Nothing goes into results/ from a tree with changes, with a failing test, or from a dry run; the JSON in $OUT says so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

dry=false
[[ ${1:-} == --dry-run ]] && dry=true
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
if ! $dry && ! nvidia-smi -L; then
  echo "gpu_sheet: nvidia-smi finds no GPU; --dry-run checks the script without one" >&2
  exit 2
fi

# stage NAME LIMIT COMMAND...: the end of its output here, all of it in $out/NAME.log, its exit code in codes[NAME]
declare -A codes
stage() {
  local name=$1 limit=$2
  shift 2
  printf '\n== %s (%d s so far)\n' "$name" "$SECONDS"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  codes[$name]=$?
  tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
}

if $dry; then
  select=(-k mask_shuffle)
else
  select=()
  stage build 150 pip install --no-build-isolation --no-deps .
  # Without the extension the Triton kernels still run, from the sources here; the JSON has the build's exit code.
  ((codes[build])) && export PYTHONPATH=$PWD
fi
stage tests 180 pytest -q -m gpu -p no:cacheprovider "${select[@]}"
if command -v compute-sanitizer >/dev/null; then
  stage sanitizer 90 compute-sanitizer --target-processes all --error-exitcode 9 \
    pytest -q tests/test_gpu.py -m gpu -p no:cacheprovider -k "exact or patch_in_every" "${select[@]}"
fi
LINES_SHOWN=70 stage benchmarks 240 pytest benchmarks/bench_ops.py -q --benchmark-only --benchmark-quiet \
  -p no:cacheprovider --benchmark-json="$out/benchmarks.json" "${select[@]}"

for name in "${!codes[@]}"; do echo "$name=${codes[$name]}"; done >"$out/codes.txt"
DRY=$dry python - "$out" <<'EOF'
import datetime, json, os, pathlib, platform, re, subprocess, sys

import torch

import matpac_fast
from matpac_fast import backend


def told(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


out = pathlib.Path(sys.argv[1])
gpu = torch.cuda.is_available()
codes = {name: int(code) for name, code in (line.split("=") for line in (out / "codes.txt").read_text().split())}
numbers = out / "benchmarks.json"  # empty or absent where the benchmarks did not get through
measured = json.loads(numbers.read_text()) if numbers.exists() and numbers.stat().st_size else {}
summary = (out / "tests.log").read_text().strip().splitlines()
sheet = {
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": told("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown"),
    "changes": told("git", "status", "--porcelain").splitlines(),
    "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
    "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
    "versions": {
        "matpac_fast": matpac_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": version("triton"),
    },
    "backends": {name: backend.unavailable(name) or "yes" for name in backend.BACKENDS[1:]},
    "exit_codes": codes,
    "tests": summary[-1] if summary else "",
    "benchmarks": [
        bench["extra_info"] | {"median_ms": 1e3 * bench["stats"]["median"], "fastest_ms": 1e3 * bench["stats"]["min"]}
        for bench in measured.get("benchmarks", [])
    ],
}
text = json.dumps(sheet, indent=1) + "\n"
(out / "sheet.json").write_text(text)
print(f"\n== {out / 'sheet.json'}")
refusals = [f"{name} ended with {code}" for name, code in codes.items() if code]
if os.environ["DRY"] == "true":
    refusals.append("a dry run")
if sheet["changes"] or sheet["commit"] == "unknown":
    refusals.append("not a clean checkout")
if refusals:
    print("not recorded under benchmarks/results: " + "; ".join(refusals))
else:
    slug = re.sub(r"[^a-z0-9]+", "-", sheet["device"].lower()).strip("-")
    record = pathlib.Path("benchmarks/results", slug, f"{sheet['date'][:10]}-{sheet['commit'][:9]}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(text)
    print(record)
sys.exit(any(codes.values()))
EOF
status=$?
rm -f "$out/codes.txt" "$out/benchmarks.json"
exit $status
