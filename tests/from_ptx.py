"""Runs the tests of tests/interpreted on what Triton compiles the kernels to, instruction by instruction."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"
# What is compiled for, files, and which of their tests: enough to see every kernel in a minute or two. All of them:
#     MATPAC_FAST_COMPILED_FOR=90 pytest tests/interpreted
RUNS: list[tuple[int, list[str], str]] = [
    (90, [""], "not test_fused and not test_tune and not test_constant and not torch.float16 and not 10000.0"),
    # These multiply matrices by other instructions, with launch options of their own.
    (80, ["masked_patch_embed"], "torch.bfloat16 and float64"),
    (100, ["attention"], "torch.bfloat16 and output_and_gradient"),
    (120, ["log_mel", "prototype_loss"], "examples or torch.bfloat16-1.0"),
]


def main() -> int:
    code = 0
    for capability, names, which in RUNS:
        files = [str(FOLDER / f"test_{name}.py" if name else FOLDER) for name in names]
        command = [sys.executable, "-m", "pytest", *files, "-k", which, "-q", "-p", "no:cacheprovider"]
        env = {**os.environ, "MATPAC_FAST_COMPILED_FOR": str(capability)}
        print(f"== sm_{capability}", flush=True)
        code = max(code, subprocess.run(command, env=env).returncode)
    return code


if __name__ == "__main__":
    sys.exit(main())
