"""The threads of the CPU kernels: torch's own, but in a forked child, where there are none of them left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from matpac_fast import backend

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or backend.unavailable("cpp") is not None, reason="needs the C++ kernels on Linux"
)

ALIKE = """
import os, threading, torch
from matpac_fast import _C, ops

def threads():
    return set(os.listdir("/proc/self/task"))

torch.set_num_threads(6)
torch.randn(1 << 22).exp()
assert len(threads()) >= 6
many, few = torch.randn(64, 160_000) / 10, torch.randn(4, 160_000) / 10  # in more and in fewer parts than threads
done, seen = threading.Event(), set()

def watch():
    while not done.is_set():
        seen.update(threads())

watcher = threading.Thread(target=watch)
watcher.start()
before = threads()
for wave in (many, few) * 3:
    ops.log_mel(wave)
after = threads()
done.set()
watcher.join()
assert seen and seen <= before, f"{len(seen - before)} threads were started"
assert after == before, f"{len(before - after)} threads have ended"
"""

FORKED = """
import os, torch
from matpac_fast import _C, ops

torch.set_num_threads(3)
wave = torch.randn(64, 16_000) / 10
want = ops.log_mel(wave)
child = os.fork()
if child == 0:
    os._exit(0 if ops.log_mel(wave).numpy().tobytes() == want.numpy().tobytes() else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""


@pytest.mark.parametrize("script", [ALIKE, FORKED], ids=["torch's own", "in a forked child"])
def test_threads(script, tmp_path):
    # In another folder: in the clone Python would take the sources, which have no kernels.
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)
