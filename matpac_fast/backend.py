"""What can run here and why not: the availability table, the dispatch rule and `use_backend`.

Two levels of dispatch. A public function of `ops` asks `choose(op, device)` and either computes the reference in plain
PyTorch or calls its registered op; inside the op's implementation for a device, `choose` names the launcher again.

*Forced and missing* raises `BackendError` with the stored reason. *Automatic and falling back to the reference on a
CUDA tensor* warns once, naming the reasons.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import BackendError

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

# op -> device type -> launchers in order of preference.
LAUNCHERS: dict[str, dict[str, tuple[str, ...]]] = {
    "log_mel": {"cpu": ("cpp",), "cuda": ("cuda", "triton")},
    "mask_shuffle": {"cpu": ("cpp",), "cuda": ("triton",)},
    "masked_patch_embed": {"cpu": ("cpp",), "cuda": ("triton",)},
    "prototype_loss": {"cpu": ("cpp",), "cuda": ("cuda", "triton")},
    # Without a kernel these are a few functions of torch's: see `fuses`.
    "prediction_loss": {"cpu": ("cpp",), "cuda": ("triton",)},
    "attention": {"cpu": ("cpp",), "cuda": ("triton",)},
    "bias_gelu": {"cpu": (), "cuda": ("triton",)},
    "add_layer_norm": {"cpu": (), "cuda": ("triton",)},
}

# Where Triton looks for it.
_PYTHON_H = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")

# Triton decides at import whether its interpreter runs the kernels, which then compute on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced = "auto"


_reasons: dict[str, str | None] = {}


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run on this machine, in one line, or None where it can."""
    if backend not in _reasons:
        _reasons[backend] = _find_reason(backend)
    return _reasons[backend]


def _find_reason(backend: str) -> str | None:
    if backend in ("auto", "reference"):
        return None
    if backend == "cpp":
        return _native_missing()
    if backend == "cuda":
        return _native_missing() or _cuda_missing()
    if backend == "triton":
        return _triton_missing()
    raise BackendError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")


# torch.compile takes the answer as a constant; it could not trace the imports. The same as the decorator
# torch.compiler.assume_constant_result, which would import all of Dynamo.
_find_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _native_missing() -> str | None:
    try:
        from . import _C  # noqa: F401
    except ImportError as error:
        if importlib.util.find_spec("matpac_fast._C") is None:
            here = Path(__file__).parent
            if _installed_elsewhere(here):
                return (
                    f"these are the sources in {here.parent}, which Python takes before the package that is installed: "
                    "run it from another folder, or set PYTHONSAFEPATH=1, or pip install -e ."
                )
            return "the extension matpac_fast._C was not built; install with a C++17 compiler: pip install ."
        return f"the extension matpac_fast._C does not load: {error}"
    return None


def _installed_elsewhere(here: Path) -> bool:
    """Whether another copy of this package, with its extension, is installed."""
    try:
        files = importlib.metadata.files("matpac_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(file.name.startswith("_C.") and Path(str(file.locate())).parent != here for file in files)


def _gpu_missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install one that was: https://pytorch.org/get-started/locally"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; nvidia-smi says whether the driver does"
    return None


def _cuda_missing() -> str | None:
    from . import _C

    if not _C.CUDA_ARCHS:
        return "the extension was built without CUDA; rebuild with nvcc: MATPAC_FAST_CUDA=ON pip install ."
    missing = _gpu_missing()
    if missing is not None:
        return missing
    driver, runtime = _C.cuda_versions()
    # A driver runs every minor release of its own major version and of those before.
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"the extension needs {runtime // 1000}.{runtime % 1000 // 10}: update the driver, or rebuild"
        )
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not _has_code_for(_C.CUDA_ARCHS, major, minor):
            return (
                f"the extension was built for {_C.CUDA_ARCHS}, GPU {device} is sm_{major}{minor}; "
                f"rebuild: MATPAC_FAST_CUDA_ARCHS={major}{minor}-real pip install ."
            )
    return None


def _has_code_for(archs: str, major: int, minor: int) -> bool:
    """Whether a build for `archs`, as CMakeLists.txt takes them, runs on compute capability major.minor.

    Machine code ("-real") runs on its own major version from its minor on; PTX ("-virtual") on everything from there
    on. An entry without a suffix is both.
    """
    for arch in archs.split(","):
        number, _, kind = arch.partition("-")
        own_major, own_minor = divmod(int(number), 10)
        if kind != "virtual" and own_major == major and own_minor <= minor:
            return True
        if kind != "real" and (own_major, own_minor) <= (major, minor):
            return True
    return False


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'matpac_fast[triton]'"
    if not INTERPRETED:
        missing = _gpu_missing()
        if missing is not None:
            return missing
        # Triton compiles its launchers with both. Without them it fails at the first launch.
        compilers = (os.environ["CC"],) if os.environ.get("CC") else ("gcc", "clang")
        if not any(map(shutil.which, compilers)):
            return f"triton finds no C compiler, {' or '.join(compilers)}; install gcc, or set CC"
        if not (_PYTHON_H.exists() or os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")):
            return f"triton finds no {_PYTHON_H}; install the headers of this Python, in Debian python3-dev"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install fails in ways of its own
        return f"triton does not load: {error}"
    return None


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for a tensor on the CPU."""
    # torch.cuda.device takes four times as long, to accept all else that may name a device.
    return torch.cuda._DeviceGuard(tensor.device.index) if tensor.is_cuda else nullcontext()


def choose(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The launcher that `op` uses on `device`: "reference" or one of LAUNCHERS. `dtype` is that of the arithmetic.

    Raises BackendError where a backend is forced that cannot serve this op on this device.
    """
    forced = _forced  # read once: another thread may set it meanwhile
    if forced == "reference":
        return "reference"
    table = LAUNCHERS[op].get(device.type, ())
    if forced != "auto":
        return _forced_launcher(forced, op, device, dtype, table)
    if transformed():
        if device.type == "cuda":
            _warn_slow(op, "torch.func or forward mode transforms it")
        return "reference"
    for launcher in table:
        if _obstacle(launcher, dtype) is None:
            return launcher
    if device.type == "cuda":
        _warn_slow(op, "; ".join(f"{launcher}: {_obstacle(launcher, dtype)}" for launcher in table))
    return "reference"


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) or forward-mode differentiation transforms what runs, which they can with
    formulas and cannot with kernels."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above; guarded by torch's own


_AUTOCASTS = ("cpu", "cuda")  # other devices, such as meta, may know no autocast


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast has matrix products taken in, or None where it is off."""
    autocasts = device.type in _AUTOCASTS and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocasts else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if device.type in _AUTOCASTS else nullcontext()


def dtype_of_products(tensor: Tensor) -> torch.dtype:
    """What a matrix product of a float tensor is taken in: autocast's dtype, or its own."""
    return autocast_dtype(tensor.device) or tensor.dtype


def _computes_bfloat16(index: int | None) -> bool:
    """Before Ampere torch emulates it, and Triton has no code for it."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


_computes_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


# Elements from which on one of Triton's kernels gains a GPU as much time, 5 ps an element of attention, as launching it
# takes the host beyond torch's own functions, 35 us (benchmarks/RECORDS.md). Gradients gain more, and training is
# launched as a CUDA graph.
_LEAST_LAUNCHED = 7_000_000


def fuses(op: str, device: torch.device, dtype: torch.dtype, elements: int | None = None) -> bool:
    """Whether an op that is a few functions of torch's runs as a Triton kernel here; `dtype` is that of the tensor.

    `elements` of a result, where they are few and nothing is differentiated, leave it to torch.
    """
    if _forced == "reference" or dtype == torch.float64:
        return False
    may_leave = _forced == "auto" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    # Compared last: a compiler would guard the number, so compile anew, and torch.export refuse dynamic sizes.
    if may_leave and elements is not None and elements < _LEAST_LAUNCHED:
        return False
    if dtype == torch.bfloat16 and device.type == "cuda" and not _computes_bfloat16(device.index):
        return False
    interpreted = INTERPRETED and _forced == "triton" and device.type == "cpu"
    return (device.type == "cuda" or interpreted) and choose(op, device, dtype) == "triton"


def takes_cpp(op: str, device: torch.device, worthwhile: bool = True) -> bool:
    """Whether an op that is a few functions of torch's runs in C++ here; where not worthwhile, only if forced."""
    if device.type != "cpu" or not (_forced == "cpp" or (_forced == "auto" and worthwhile)):
        return False
    return choose(op, device) == "cpp"


def prefers_onednn(device: torch.device) -> bool:
    """Whether to ask oneDNN for a float32 product, where torch asks MKL by itself."""
    return device.type == "cpu" and _forced != "reference" and _onednn_leads()


def _onednn_leads() -> bool:
    return _mkl_lags() and torch._C._get_mkldnn_enabled()


_onednn_leads._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


@functools.cache
def _mkl_lags() -> bool:
    """MKL has AVX2 kernels alone for AMD's CPUs; with AVX-512 oneDNN's are faster (benchmarks/RECORDS.md)."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512" or _native_missing() is not None:
        return False
    from . import _C

    return _C.cpu_is_amd() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _obstacle(launcher: str, dtype: torch.dtype | None) -> str | None:
    if launcher == "triton" and dtype == torch.float64:
        return "it has no float64"
    return unavailable(launcher)


def _forced_launcher(
    forced: str, op: str, device: torch.device, dtype: torch.dtype | None, table: tuple[str, ...]
) -> str:
    if transformed():
        raise BackendError(
            f"{op}: backend {forced!r} is forced, and torch.func and forward mode transform the reference alone; "
            "use auto or reference"
        )
    # "cuda" means the fastest native CUDA path; an op whose only CUDA path is Triton takes it.
    launcher = "triton" if forced == "cuda" and table == ("triton",) else forced
    # Triton's interpreter computes on CPU tensors: that is how its kernels are tested without a GPU.
    interpreted = launcher == "triton" and device.type == "cpu" and INTERPRETED
    if launcher not in table and not interpreted:
        raise BackendError(
            f"{op}: backend {forced!r} is forced and has no path for a tensor on {device.type}; "
            f"move the tensor or use one of: auto, reference{''.join(', ' + b for b in table)}"
        )
    reason = _obstacle(launcher, dtype)
    if reason is not None:
        through = "" if launcher == forced else f", its path being {launcher}"
        raise BackendError(f"{op}: backend {forced!r} is forced and cannot run here{through}: {reason}")
    return launcher


@functools.cache
def _warn_slow(op: str, reasons: str) -> None:
    warnings.warn(
        f"matpac_fast.ops.{op} runs on the PyTorch reference on this GPU ({reasons})",
        stacklevel=3,
    )


class use_backend:
    """Force a backend for every op, as a function or as a context manager.

    >>> use_backend("reference")                  # from here on
    >>> with use_backend("cpp"): ...              # inside the block only

    Args:
        name: "auto" (the fastest that can run, per device), "reference", "cpp", "cuda" or "triton".

    Raises:
        BackendError: `name` is unknown, or cannot run on this machine (the message says why).

    The setting is one per process, not per thread: it is meant for tests, benchmarks and debugging.
    """

    def __init__(self, name: str):
        global _forced
        reason = unavailable(name)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
        self._name, self._before = name, [_forced]  # what was forced before it, block by block
        self._entered = False
        _forced = name

    def __enter__(self) -> use_backend:
        global _forced
        if self._entered or _forced != self._name:  # again, or another was forced since
            self._before.append(_forced)
        _forced, self._entered = self._name, True
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        global _forced
        _forced = self._before.pop()


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    from . import __version__

    return {
        "matpac_fast": __version__,
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def table() -> str:
    """What runs where, as text: one line a backend, then the launcher each op takes by device."""
    lines = ["backend    here"]
    lines += [f"{name:<10} {unavailable(name) or 'yes'}" for name in BACKENDS[1:]]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines += ["", f"{'op':<20} " + " ".join(f"{d:<10}" for d in devices)]
    for op in LAUNCHERS:
        lines.append(f"{op:<20} " + " ".join(f"{_choice(op, d):<10}" for d in devices))
    return "\n".join(line.rstrip() for line in lines)


def _choice(op: str, device_type: str) -> str:
    try:
        return choose(op, torch.device(device_type))
    except BackendError:
        return "-"
