"""Run a command as on a GPU, on a machine that has none: its host side is real, and nothing is computed.

    python benchmarks/rehearse/run.py python benchmarks/bench_host.py
    REHEARSE_GPUS=2 python benchmarks/rehearse/run.py torchrun --nproc-per-node 2 -m matpac_fast.cli pretrain ...

Before an hour on a GPU is paid for: whether all host code comes through, what every launch takes the host, how much
memory a step asks for and which launches exceed a GPU's limits. Results are garbage, and so is what is decided by them.
It needs a torch built with CUDA 13, whose libraries it plays, nvcc and nm. Our own CUDA C++ links its runtime into
itself: build without it, MATPAC_FAST_CUDA=OFF, and Triton's kernels take its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("cublas", "cusolver", "cusparse", "cufft", "curand", "nccl")


def symbols(library: Path, *options: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", *options, str(library)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def build(torch_folder: Path, folder: Path) -> Path:
    """One library, preloaded in place of the driver and of all that torch calls of CUDA's libraries."""
    compiler = [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "-cudart", "none", "-shared"]
    compiler += ["-Xcompiler", "-fPIC,-w", "-Xlinker", "-soname,libcuda.so.1"]
    ours = folder / "ours.so"
    sources = [str(HERE / name) for name in ("runtime.cpp", "libraries.cpp")]
    subprocess.run([*compiler, *sources, "-o", str(ours), "-ldl"], check=True)
    wanted = set().union(*(symbols(found, "--undefined-only") for found in torch_folder.glob("lib/libtorch_cuda*.so")))
    rest = {name for name in wanted if name.startswith(LIBRARIES)} - symbols(ours, "--defined-only")
    stubs = folder / "stubs.cpp"
    stubs.write_text('extern "C" {\n' + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(rest)) + "}\n")
    library = folder / "libcuda.so.1"
    command = [*compiler, *sources, str(stubs), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    import torch

    if torch.version.cuda is None or not torch.version.cuda.startswith("13."):
        built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"rehearse: torch {torch.__version__} is built {built}; it takes one with CUDA 13", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build(Path(torch.__file__).parent, folder)
        paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": HERE / "site"}
        environment = {key: f"{path}{os.pathsep}{os.environ.get(key, '')}".rstrip(":") for key, path in paths.items()}
        environment |= {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": name, "TRITON_CACHE_DIR": f"{name}/triton"}
        return subprocess.run(sys.argv[1:], env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
