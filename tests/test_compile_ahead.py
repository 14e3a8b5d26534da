"""Every Triton kernel compiles for every supported architecture, within its shared memory, and spills no more than its
launch says, which is nothing but for one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from compile_ahead import TENSOR_LIMIT, Cost, compile_ahead, compiled_ahead
from early import triton_cache
from sass import overwritten_factors, unwritten_reads

pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")

import triton
from torch.torch_version import TorchVersion
from triton.runtime.jit import JITFunction

from matpac_fast import kernels
from matpac_fast.kernels._aot import SHARED_LIMIT, Launch

MODULES = [
    importlib.import_module(f"matpac_fast.kernels.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
    if not module.name.startswith("_")
]
LAUNCHES: dict[str, Launch] = {launch.name: launch for module in MODULES for launch in module.AOT}
# Launch options are chosen for the pinned Triton; another allocates registers in its own way, an old one worse.
VERSION = TorchVersion(triton.__version__)
SPILLS = 0 if triton.__version__.startswith("3.7.") else 64 if VERSION >= "3.6" else 512
Key = tuple[str, int]  # a launch's name and a compute capability
# Triton 3.2, which torch 2.6 brings, knows no Blackwell.
NEWEST = 90 if VERSION < "3.3" else 120
KEYS: list[Key] = [(name, each) for name, launch in LAUNCHES.items() for each in launch.capabilities if each <= NEWEST]


def compile_one(key: Key) -> Cost:
    """In a process of the pool, which finds the kernel by name: a compiled function cannot be sent."""
    name, capability = key
    return compile_ahead(LAUNCHES[name], capability)


@pytest.fixture(scope="module")
def costs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Future[Cost]]:
    """Compilations under way on every core, into a cache that may hold many of them already."""
    folder = triton_cache(request.config) or tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            return {key: pool.submit(compile_one, key) for key in KEYS}


@pytest.mark.parametrize("name", dict(KEYS))
def test_compiles_as_it_shall(name: str, costs: dict[Key, Future[Cost]], capsys: pytest.CaptureFixture[str]) -> None:
    by_capability = {capability: costs[key, capability].result() for key, capability in KEYS if key == name}
    with capsys.disabled():
        cells = [
            f"sm_{capability}: {cost.registers:>3} regs {cost.shared:>6} B {cost.spills} spilt"
            for capability, cost in by_capability.items()
        ]
        print(f"\n  {name:<36} | {' | '.join(cells)} ", end="")
    for capability, cost in by_capability.items():
        where = f"{name} for sm_{capability}"
        assert cost.spills <= max(SPILLS, LAUNCHES[name].max_spills), f"{where} spills {cost.spills} bytes"
        assert cost.shared <= SHARED_LIMIT[capability], f"{where} takes {cost.shared} bytes of shared memory"
        assert cost.tensor <= TENSOR_LIMIT, f"{where} takes {cost.tensor} columns of tensor memory"
        assert cost.registers <= LAUNCHES[name].max_registers, f"{where} takes {cost.registers} registers"
        assert not cost.unwritten, f"{where} reads registers that nothing has written: {cost.unwritten}"
        assert not cost.overwritten, f"{where} overwrites factors of products under way: {cost.overwritten}"


LISTING = """
.section .text.kernel
.text.kernel:
        /*0000*/                   UMOV UR4, 0x400 ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   UIADD3 UR6, UP0, UR4, 0x1, URZ ;
        /*0030*/                   UMOV UR7, 0x40000040 ;
.L_x_1:
        /*0040*/                   HGMMA.64x8x16.F32.BF16 R92, R28, gdesc[UR4].tnspB, R92, gsb0 ;
        /*0050*/                   EXIT ;
"""


def test_a_register_that_nothing_has_written_is_found() -> None:
    """On one of two ways to the product its factor's descriptor, UR6 and UR7, is not there."""
    assert [line[:4] for line in unwritten_reads(LISTING)] == ["0040"]
    assert unwritten_reads(LISTING.replace("@!P0 BRA `(.L_x_1)", "NOP")) == []


WAITS = "        /*0048*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"


@pytest.mark.parametrize(
    ("written", "told"), [("MOV R30, R2", True), ("LDS.64 R27, [R2]", True), ("MOV R32, R2", False)]
)
def test_a_factor_that_is_overwritten_while_it_is_read_is_found(written, told):
    """R28 to R31 are the product's first factor."""
    listing = LISTING.replace("EXIT ;", f"{written} ;\n        /*0060*/                   EXIT ;")
    assert [line[:4] for line in overwritten_factors(listing)] == ["0050"] * told
    waited = listing.replace("        /*0050*/", WAITS + "        /*0050*/")
    assert overwritten_factors(waited) == []


def test_the_length_of_a_vector_with_a_nan_is_nan() -> None:
    """A GPU's maximum of NaN and a number is the number, unlike the interpreter's, unless it is told otherwise."""
    launch = next(launch for name, launch in LAUNCHES.items() if name.startswith("prediction_loss_fwd"))
    assert compiled_ahead(launch, 90).asm["ptx"].count("max.NaN.f32") >= 2


def test_every_kernel_is_listed() -> None:
    """A kernel without a launch in its module's AOT list would escape the test above."""
    listed = {launch.kernel for launch in LAUNCHES.values()}
    kernels_here = {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels_here, "no kernel found: are their names still <op>_kernel?"
    assert [name for name, kernel in kernels_here.items() if kernel not in listed] == []


def test_names_are_unique() -> None:
    assert len(LAUNCHES) == sum(len(module.AOT) for module in MODULES)
