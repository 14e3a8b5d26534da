"""What `import matpac_fast` promises: its names, its cost, its types."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys

import matpac_fast as mf
from matpac_fast import cli


def test_public_names():
    assert {
        "Matpac",
        "MatpacConfig",
        "Encoder",
        "get_matpac",
        "list_encoders",
        "load_encoder",
        "ops",
        "use_backend",
    } <= set(mf.__all__)
    assert all(hasattr(mf, name) for name in mf.__all__)
    assert {"log_mel", "masked_patch_embed", "prototype_loss", "mask_shuffle"} <= set(mf.ops.__all__)
    assert mf.__version__ == importlib.metadata.version("matpac_fast")


def test_importing_needs_torch_and_numpy_only():
    code = (
        "import sys, torch; before = set(sys.modules); import matpac_fast; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"soundfile", "soxr", "pyarrow", "safetensors", "tyro", "rich", "triton", "matplotlib", "sklearn", "scipy"}
    assert not heavy & set(got)
    assert "matpac_fast" in got


def test_the_package_is_typed():
    assert (importlib.resources.files("matpac_fast") / "py.typed").is_file()


def test_the_module_prints_what_runs_here():
    run = subprocess.run([sys.executable, "-m", "matpac_fast"], capture_output=True, text=True, check=True)
    assert f"matpac_fast {mf.__version__}" in run.stdout
    assert all(name in run.stdout for name in ("reference", "cpp", "cuda", "triton", "log_mel", "prototype_loss"))


def test_the_module_with_arguments_is_the_command_line():
    run = subprocess.run([sys.executable, "-m", "matpac_fast", "embd"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (cli.FAILED, "")
    assert "no command 'embd'" in run.stderr
