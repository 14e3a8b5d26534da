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
    listed = subprocess.run(["nm", *options, str(library)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line}


def build(nvcc: str, torch_folder: Path, folder: Path) -> Path:
    """One library, preloaded in place of the driver and of all that torch calls of CUDA's libraries."""
    objects = []
    for name in ("runtime", "libraries"):
        objects.append(folder / f"{name}.o")
        source = str(HERE / f"{name}.cpp")
        subprocess.run([nvcc, "-c", "-Xcompiler", "-fPIC,-w", source, "-o", str(objects[-1])], check=True)
    given = set().union(*(symbols(found, "--defined-only") for found in objects))
    called = set().union(*(symbols(found, "-D", "-u") for found in torch_folder.glob("lib/libtorch_cuda*.so")))
    rest = sorted(name for name in called - given if name.startswith(LIBRARIES))
    stubs = folder / "stubs.cpp"
    stubs.write_text('extern "C" {\n' + "".join(f"int {name}() {{ return 0; }}\n" for name in rest) + "}\n")
    library = folder / "libcuda.so.1"
    command = [nvcc, "-cudart", "none", "-shared", "-Xcompiler", "-fPIC,-w", "-Xlinker", "-soname,libcuda.so.1"]
    subprocess.run([*command, str(stubs), *map(str, objects), "-o", str(library), "-ldl"], check=True)
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
    nvcc = shutil.which("nvcc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
    if nvcc is None:
        print("rehearse: nvcc is not on the PATH nor in /usr/local/cuda/bin; install CUDA's toolkit", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build(nvcc, Path(torch.__file__).parent, folder)
        paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": HERE / "site"}
        environment = {key: f"{path}{os.pathsep}{os.environ.get(key, '')}".rstrip(":") for key, path in paths.items()}
        # What Triton's launchers are linked with is gone afterwards, and so must they be.
        environment |= {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": name, "TRITON_CACHE_DIR": f"{name}/triton"}
        return subprocess.run(sys.argv[1:], env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
