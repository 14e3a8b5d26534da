"""A few of the faults of benchmarks/faults, which tries them all; and that it finds what is not written whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "benchmarks/faults/run.py"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs Linux, a C++ compiler and a process into which nothing is preloaded",
)

# A rename that is none: the file that is there is written over.
TORN = """
import os
def replace(source, target):
    with open(source, "rb") as old, open(target, "wb", buffering=0) as new:
        new.write(old.read())
    os.unlink(source)
os.replace = replace
"""


def tried(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_embed_ends_alike_whichever_call_fails_or_is_its_last():
    code, said = tried("embed", "--every", "25", "--how", "kill", "ENOSPC+")
    assert code == 0, said
    assert re.search(r"^[1-9]\d+ runs, findings: 0$", said, re.MULTILINE)
    assert re.search(r"^kill  .* OUT/.*  ends with -9$", said, re.MULTILINE)
    assert re.search(
        r"^ENOSPC\+ .*  ends with 2  matpac-fast embed: OUT.*: No space left on device", said, re.MULTILINE
    )


def test_what_is_not_written_whole_is_found(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TORN)
    code, said = tried("prepare", "--how", "cut", PYTHONPATH=str(tmp_path))
    assert code == 1, said
    assert re.search(r"^FINDING: .*\.parquet", said, re.MULTILINE)
