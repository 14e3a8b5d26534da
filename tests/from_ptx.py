"""Runs the tests of tests/interpreted on what Triton compiles the kernels to, instruction by instruction."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"
# sm_80 and sm_120 multiply matrices by other instructions than sm_90, each with launch options of its own.
RUNS: list[tuple[int, list[str]]] = [
    (90, [""]),
    (80, ["attention", "masked_patch_embed"]),
    (120, ["log_mel", "prototype_loss"]),
]


def main() -> int:
    code = 0
    for capability, names in RUNS:
        files = [str(FOLDER / f"test_{name}.py" if name else FOLDER) for name in names]
        command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"]
        env = {**os.environ, "MATPAC_FAST_COMPILED_FOR": str(capability)}
        print(f"== sm_{capability}", flush=True)
        code = max(code, subprocess.run(command, env=env).returncode)
    return code


if __name__ == "__main__":
    sys.exit(main())
