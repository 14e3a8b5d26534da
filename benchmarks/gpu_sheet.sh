#!/usr/bin/env bash
# One command on a machine with a GPU, within ten minutes and without a network: build, the GPU tests, compute-sanitizer
# where there is one, every benchmark and a profile, and one JSON of it all (benchmarks/sheet.py).
#
#   benchmarks/gpu_sheet.sh              into benchmarks/results/<device>/<date>-<commit>.json, and into $OUT at most
#                                        six files: sheet.json, log.txt, build.log, trace.json.gz, memory.pickle.gz,
#                                        temporal_support.png
#   benchmarks/gpu_sheet.sh --dry-run    no build, one op, whatever device is here: checks this script itself
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"

if [[ ${1:-} != --dry-run ]]; then
  if ! nvidia-smi -L; then
    echo "gpu_sheet: nvidia-smi finds no GPU; --dry-run checks the script without one" >&2
    exit 2
  fi
  printf '\n== build\n'
  if ! timeout 150 pip install --no-build-isolation --no-deps . >"$out/build.log" 2>&1; then
    tail -n 15 "$out/build.log"
    echo "gpu_sheet: the extension did not build; Triton's kernels run from the sources here" >&2
    export PYTHONPATH=$PWD
  fi
fi
# What the build left of nine and a half minutes.
exec python benchmarks/sheet.py --out "$out" --minutes "$(((570 - SECONDS) / 60)).$(((570 - SECONDS) % 60 * 10 / 60))" "$@"
