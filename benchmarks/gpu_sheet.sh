#!/usr/bin/env bash
# One command on a machine with a GPU, within ten minutes and without a network: build, the GPU tests, every benchmark
# and a profile, compute-sanitizer where there is one, and one JSON of it all (benchmarks/sheet.py).
#
#   benchmarks/gpu_sheet.sh              into benchmarks/results/<device>/<date>-<commit>.json, and into $OUT at most
#                                        six files: sheet.json, log.txt, build.log, trace.json.gz, memory.pickle.gz,
#                                        temporal_support.png
#   benchmarks/gpu_sheet.sh --no-build   with what an earlier call has built on this machine
#   benchmarks/gpu_sheet.sh --incomplete also where the extension does not build: Triton's kernels, from the sources
#                                        here; not recorded
#   benchmarks/gpu_sheet.sh --dry-run    no build, one op, whatever device is here: checks this script itself
#
# Other options are sheet.py's. COMMIT=SHA names the commit where the tree comes without its .git; without either
# nothing is recorded.
#
# What 570 seconds go into: build 20 and tests 50, as an H200 with 16 cores took; by estimate imports and the machine's
# facts 15, step 160, profile 45, attention 15, ops 140, embed 25, sanitizer 60: 530, which leaves temporal_support its
# shortest points.
# A stage that takes longer is ended at its bound, or where those after it would go short of their least (BOUNDS in
# sheet.py). In two calls on a machine that stays warm between them, 300 seconds and 400, nothing goes short:
#
#   COMMIT=SHA benchmarks/gpu_sheet.sh --only tests step profile attention
#   COMMIT=SHA benchmarks/gpu_sheet.sh --no-build --minutes 7 --only ops embed sanitizer temporal_support
#
# and afterwards, wherever the two sheet.json are: python benchmarks/sheet.py --join FIRST SECOND
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
# What is installed, and not the sources here, which have no extension: `python -m` would put this folder first.
export PYTHONSAFEPATH=1
export PATH=/usr/local/cuda/bin:$PATH # nvcc and compute-sanitizer, which are often not on it

build=yes incomplete='' options=()
for option in "$@"; do
  [[ $option == --dry-run || $option == --no-build ]] && build=''
  [[ $option == --incomplete ]] && incomplete=yes
  [[ $option == --no-build ]] || options+=("$option")
done

if [[ " $* " != *" --dry-run "* ]] && ! nvidia-smi -L; then
  echo "gpu_sheet: nvidia-smi finds no GPU; --dry-run checks the script without one" >&2
  exit 2
fi
if [[ $build ]]; then
  printf '\n== build\n'
  # For this GPU alone, and an error where there is no nvcc: left to itself the build would be one for the CPU.
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
  if ! MATPAC_FAST_CUDA=ON MATPAC_FAST_CUDA_ARCHS=$arch-real \
    timeout 150 python3 -m pip install --no-build-isolation --no-deps . >"$out/build.log" 2>&1; then
    tail -n 15 "$out/build.log"
    if [[ ! $incomplete ]]; then
      echo "gpu_sheet: the extension did not build; --incomplete runs Triton's kernels alone" >&2
      exit 1
    fi
    export PYTHONPATH=$PWD
  fi
  printf '== build: %d s\n' "$SECONDS"
fi
# What the build left of nine and a half minutes.
minutes=$(((570 - SECONDS) / 60)).$(((570 - SECONDS) % 60 * 10 / 60))
exec python3 benchmarks/sheet.py --out "$out" --minutes "$minutes" "${options[@]}"
