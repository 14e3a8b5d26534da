"""The dispatch rules: what is chosen, what is refused and in which words, on machines that this one is not."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from matpac_fast import backend, ops, reference, use_backend
from matpac_fast.errors import BackendError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = [op for op, table in backend.LAUNCHERS.items() if table["cuda"]]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Each test meets its own machine."""
    backend._reasons.clear()
    backend._warn_slow.cache_clear()
    yield
    backend._reasons.clear()
    backend._warn_slow.cache_clear()


class Machine:
    """A machine with one H100, a fresh driver, Triton, and an extension built for it, of which parts can be broken."""

    def __init__(self, patch: pytest.MonkeyPatch):
        from matpac_fast import _C

        self.patch, self.native = patch, _C
        patch.setattr(backend, "INTERPRETED", False)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        self.built_for("80-real,90-real,100,120", driver=13000, runtime=13000)
        self.gpu(9, 0)
        patch.setitem(sys.modules, "triton", type(sys)("triton"))
        sys.modules["triton"].__spec__ = importlib.machinery.ModuleSpec("triton", None)
        patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        patch.delenv("CC", raising=False)
        patch.setattr(backend, "_PYTHON_H", Path(__file__))

    def gpu(self, major: int, minor: int) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    def built_for(self, archs: str, driver: int, runtime: int) -> None:
        self.patch.setattr(self.native, "CUDA_ARCHS", archs)
        self.patch.setattr(self.native, "cuda_versions", lambda: (driver, runtime))

    def no_native(self, message: str) -> None:
        """The extension does not import, whether it is not there or does not load."""
        import matpac_fast

        self.patch.delattr(matpac_fast, "_C")
        self.patch.setitem(sys.modules, "matpac_fast._C", None)
        spec = None if "not built" in message else importlib.machinery.ModuleSpec("matpac_fast._C", None)
        self.patch.setattr(backend.importlib.util, "find_spec", lambda name: spec)
        self.patch.setattr(importlib.metadata, "files", lambda name: [])  # an editable install has it elsewhere


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def on_cpu(op: str) -> str:
    """The first of its table; some ops are torch's own there."""
    return next(iter(backend.LAUNCHERS[op]["cpu"]), "reference")


def refused(name: str) -> str:
    with pytest.raises(BackendError) as caught:
        use_backend(name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"backend {name!r} cannot run here: ")
    return str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_everything_there_takes_the_first_of_its_table(machine, op):
    assert [backend.unavailable(name) for name in backend.BACKENDS] == [None] * 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose(op, CPU) == on_cpu(op)
        assert backend.choose(op, CUDA) == backend.LAUNCHERS[op]["cuda"][0]


@pytest.mark.parametrize("op", OPS)
def test_no_cuda_in_the_extension_takes_triton(machine, op):
    machine.built_for("", 0, 0)
    assert backend.choose(op, CUDA) == "triton"
    assert "built without CUDA; rebuild with nvcc" in refused("cuda")


@pytest.mark.parametrize("op", OPS)
def test_forcing_the_reference(machine, op):
    with use_backend("reference"):
        assert backend.choose(op, CPU) == backend.choose(op, CUDA) == "reference"
    assert backend.choose(op, CPU) == on_cpu(op)


def test_the_extension_needs_code_for_each_gpu_of_the_machine(machine):
    machine.built_for("90-real", driver=13000, runtime=13000)
    machine.patch.setattr(torch.cuda, "device_count", lambda: 2)
    machine.patch.setattr(torch.cuda, "get_device_capability", lambda device=None: [(9, 0), (8, 0)][device or 0])
    assert "built for 90-real, GPU 1 is sm_80; rebuild: MATPAC_FAST_CUDA_ARCHS=80-real" in refused("cuda")


def test_what_transforms_the_reference_on_a_gpu_is_told(machine):
    machine.patch.setattr(backend, "transformed", lambda: True)
    with pytest.warns(UserWarning, match="log_mel runs on the PyTorch reference on this GPU .torch.func or forward"):
        assert backend.choose("log_mel", CUDA) == "reference"


@pytest.mark.parametrize(("gpu", "computes"), [((7, 5), False), ((8, 0), True)])
def test_before_ampere_nothing_is_fused_in_bfloat16(machine, gpu, computes):
    machine.gpu(*gpu)
    assert backend.fuses("add_layer_norm", CUDA, torch.bfloat16) == computes
    assert backend.fuses("add_layer_norm", CUDA, torch.float16)


def test_few_numbers_without_gradients_are_left_to_torch(machine):
    few, enough = backend._LEAST_LAUNCHED - 1, backend._LEAST_LAUNCHED

    def fused(elements):
        return backend.fuses("attention", CUDA, torch.bfloat16, elements)

    assert fused(few)
    with torch.no_grad():
        assert not fused(few)
        assert fused(enough)
        assert fused(None)
        with use_backend("triton"):
            assert fused(few)
        machine.patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert fused(few)


def test_broken_driver(machine):
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device; nvidia-smi" in refused("cuda")
    assert "no CUDA device; nvidia-smi" in refused("triton")
    assert backend.choose("log_mel", CPU) == "cpp"


def test_torch_without_cuda(machine):
    machine.patch.setattr(torch.version, "cuda", None)
    assert "this torch was built without CUDA" in refused("cuda")
    assert "this torch was built without CUDA" in refused("triton")


@pytest.mark.parametrize(
    ("driver", "runtime", "runs"),
    [(12080, 13000, False), (0, 12080, False), (13000, 13020, True), (13000, 12080, True), (13000, 13000, True)],
)
def test_driver_too_old_for_the_wheel(machine, driver, runtime, runs):
    machine.built_for("90-real", driver, runtime)
    if runs:
        assert backend.unavailable("cuda") is None
        return
    reason = refused("cuda")
    assert f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}," in reason
    assert f"needs {runtime // 1000}.{runtime % 1000 // 10}: update the driver" in reason


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),  # machine code runs on later minors
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80-real,90", (10, 0), True),  # PTX runs on what comes after
        ("90-virtual", (12, 0), True),
        ("90-virtual", (8, 9), False),
        ("100,120", (7, 5), False),
        ("120-real", (12, 1), True),
    ],
)
def test_a_gpu_the_wheel_has_no_code_for(machine, archs, gpu, runs):
    machine.built_for(archs, 13000, 13000)
    machine.gpu(*gpu)
    if runs:
        assert backend.unavailable("cuda") is None
    else:
        assert f"built for {archs}, GPU 0 is sm_{gpu[0]}{gpu[1]}; rebuild: MATPAC_FAST_CUDA_ARCHS=" in refused("cuda")


def test_missing_triton(machine):
    machine.patch.delitem(sys.modules, "triton")
    machine.patch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed; pip install 'matpac_fast[triton]'" in refused("triton")


def test_broken_triton(machine):
    machine.patch.setitem(sys.modules, "triton", None)
    machine.patch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert "triton does not load: " in refused("triton")


def test_triton_without_a_compiler(machine):
    machine.patch.setattr(shutil, "which", lambda name: name if name == "/opt/cc" else None)
    assert "triton finds no C compiler, gcc or clang; install gcc" in refused("triton")
    for compiler, reason in (
        ("/opt/cc", None),
        ("/gone/cc", "triton finds no C compiler, /gone/cc; install gcc, or set CC"),
    ):
        backend._reasons.clear()
        machine.patch.setenv("CC", compiler)
        assert backend.unavailable("triton") == reason


def test_triton_without_the_headers_of_python(machine):
    machine.patch.setattr(backend, "_PYTHON_H", Path("/usr/include/python3.12/Python.h.gone"))
    for name in ("CPATH", "C_INCLUDE_PATH"):
        machine.patch.delenv(name, raising=False)
    assert "finds no /usr/include/python3.12/Python.h.gone; install the headers" in refused("triton")
    backend._reasons.clear()
    machine.patch.setenv("CPATH", "/opt/python/include")
    assert backend.unavailable("triton") is None


@pytest.mark.parametrize("message", ["was not built", "does not load"])
def test_extension_that_is_not_built_or_does_not_load(machine, message):
    machine.no_native(message)
    assert message in refused("cpp")
    assert message in refused("cuda")
    assert backend.choose("log_mel", CPU) == "reference"


@pytest.mark.parametrize(("folder", "says"), [("site-packages", "run it from another folder"), (".", "was not built")])
def test_sources_before_the_package_that_is_installed(machine, tmp_path, folder, says):
    """`python -m` in a clone takes the sources, whose extension was built elsewhere."""
    machine.no_native("was not built")
    machine.patch.setattr(backend, "__file__", str(tmp_path / "matpac_fast" / "backend.py"))
    built = SimpleNamespace(name="_C.abi3.so", locate=lambda: tmp_path / folder / "matpac_fast" / "_C.abi3.so")
    machine.patch.setattr(importlib.metadata, "files", lambda name: [built])
    assert says in refused("cpp")


@pytest.mark.parametrize("op", OPS)
def test_auto_on_a_gpu_with_nothing_warns_once_and_says_why(machine, op):
    machine.built_for("", 0, 0)
    machine.patch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=f"ops.{op} runs on the PyTorch reference") as caught:
        assert backend.choose(op, CUDA) == "reference"
    assert "triton: triton finds no C compiler" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose(op, CUDA) == "reference"
        assert backend.choose(op, CPU) == on_cpu(op), "the CPU is no reason to warn"


@pytest.mark.parametrize("op", OPS)
def test_forced_on_the_wrong_device(machine, op):
    with use_backend("cpp"), pytest.raises(BackendError, match=f"{op}: backend 'cpp' is forced.*tensor on cuda"):
        backend.choose(op, CUDA)
    for name in ("cuda", "triton"):
        with use_backend(name), pytest.raises(BackendError, match=f"{op}: backend '{name}' is forced.*tensor on cpu"):
            backend.choose(op, CPU)


def test_cuda_means_triton_where_an_op_has_nothing_else(machine):
    with use_backend("cuda"):
        assert backend.choose("mask_shuffle", CUDA) == "triton"
        machine.patch.setitem(sys.modules, "triton", None)
        machine.patch.setattr(backend.importlib.util, "find_spec", lambda name: object())
        backend._reasons.pop("triton", None)
        with pytest.raises(BackendError, match="cannot run here, its path being triton: triton does not load"):
            backend.choose("mask_shuffle", CUDA)


def test_a_backend_lost_after_it_was_forced(machine):
    with use_backend("triton"):
        backend._reasons["triton"] = "it went away"
        with pytest.raises(BackendError, match="'triton' is forced and cannot run here: it went away"):
            backend.choose("mask_shuffle", CUDA)


def test_interpreter_serves_the_cpu_only_when_forced(machine):
    machine.patch.setattr(backend, "INTERPRETED", True)
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.choose("mask_shuffle", CPU) == "cpp"
    with use_backend("triton"):
        assert backend.choose("mask_shuffle", CPU) == "triton"


def test_use_backend_nests_and_survives_errors():
    with use_backend("reference"):
        with use_backend("cpp"):
            assert backend.choose("log_mel", CPU) == "cpp"
        assert backend.choose("log_mel", CPU) == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("cpp"):
            raise ZeroDivisionError
        assert backend.choose("log_mel", CPU) == "reference"
    assert backend.choose("log_mel", CPU) == "cpp"
    use_backend("reference")
    try:
        assert backend.choose("log_mel", CPU) == "reference"
    finally:
        use_backend("auto")


def test_one_setting_may_be_entered_in_its_own_block():
    setting = use_backend("reference")
    with setting:
        with setting:
            assert backend.choose("log_mel", CPU) == "reference"
        assert backend.choose("log_mel", CPU) == "reference"
    assert backend.choose("log_mel", CPU) == "cpp"


def test_a_setting_made_earlier_holds_in_its_block_and_more_than_once():
    try:
        settings = {name: use_backend(name) for name in ("cpp", "reference", "auto")}
        for name in ("reference", "cpp", "reference", "auto"):
            with settings[name]:
                assert backend._forced == name
        use_backend("auto")
        with settings["cpp"], pytest.raises(ZeroDivisionError), settings["reference"]:
            raise ZeroDivisionError
        assert backend._forced == "auto"
    finally:
        use_backend("auto")


def test_a_backend_that_another_thread_sets_during_a_choice_is_for_the_next(monkeypatch):
    class Interrupted(dict):
        def get(self, *args):
            backend._forced = "reference"
            return super().get(*args)

    monkeypatch.setitem(backend.LAUNCHERS, "log_mel", Interrupted(backend.LAUNCHERS["log_mel"]))
    with use_backend("cpp"):
        assert backend.choose("log_mel", CPU) == "cpp"


def test_a_refused_backend_changes_nothing():
    with pytest.raises(BackendError, match="unknown backend 'cub'; expected one of auto, reference, cpp, cuda, triton"):
        use_backend("cub")
    assert backend.choose("log_mel", CPU) == "cpp"


def test_float64_has_no_triton(machine):
    with pytest.warns(UserWarning, match=r"runs on the PyTorch reference.*triton: it has no float64"):
        assert backend.choose("masked_patch_embed", CUDA, torch.float64) == "reference"
    assert backend.choose("masked_patch_embed", CUDA, torch.float32) == "triton"
    for name in ("triton", "cuda"):
        with use_backend(name), pytest.raises(BackendError, match=f"'{name}' is forced .*it has no float64"):
            backend.choose("masked_patch_embed", CUDA, torch.float64)


def test_a_device_without_kernels_takes_the_reference():
    assert backend.choose("log_mel", torch.device("meta")) == "reference"


def test_the_table_names_reasons_and_choices(machine):
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    text = backend.table()
    assert "triton     torch finds no CUDA device" in text
    assert "log_mel              cpp" in text
    machine.patch.setattr(torch.cuda, "is_available", lambda: True)
    backend._reasons.clear()
    with use_backend("cpp"):
        assert "log_mel              cpp        -" in backend.table(), (
            "the table stands even where a choice would raise"
        )


def test_no_native_call_when_the_reference_is_forced(monkeypatch):
    from matpac_fast import _C

    monkeypatch.setattr(_C, "mask_shuffle_cpu", None)
    index = torch.arange(3)
    with use_backend("reference"):
        assert torch.equal(ops.mask_shuffle(0, 0, index, 5), reference.mask_shuffle(0, 0, index, 5))
    with use_backend("cpp"), pytest.raises(TypeError, match="not callable"):
        ops.mask_shuffle(0, 0, index, 5)


def test_attention_and_gelu_say_how_many_numbers_they_make(monkeypatch):
    asked = []

    def fuses(op, device, dtype, elements=None):
        asked.append((op, elements))
        return False

    for name in ("matpac_fast.ops.attention", "matpac_fast.nn.linear"):
        monkeypatch.setattr(importlib.import_module(name), "fuses", fuses)
    importlib.import_module("matpac_fast.ops.attention").has_kernel(CUDA, torch.bfloat16, 2, 3, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        importlib.import_module("matpac_fast.nn.linear").linear_gelu(torch.nn.Linear(6, 24), torch.randn(2, 5, 6))
    assert asked == [("attention", 2 * 3 * 4 * 32), ("bias_gelu", 2 * 5 * 24)]


def test_without_gradients_an_op_passes_autograd_by(monkeypatch):
    module = importlib.import_module("matpac_fast.ops.attention")
    qkv = torch.randn(2, 5, 3, 2, 32, requires_grad=True)
    with use_backend("cpp"):
        want = ops.attention(qkv)
        monkeypatch.setattr(module._Attention, "apply", None)
        with torch.no_grad():
            assert torch.equal(ops.attention(qkv), want)
        with pytest.raises(TypeError, match="not callable"):
            ops.attention(qkv)
