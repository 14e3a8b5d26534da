"""Every Triton kernel compiles for every supported architecture, without spills and within its shared memory."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")

from matpac_fast import kernels
from matpac_fast.kernels._aot import SHARED_LIMIT, Launch, compile_ahead


def launches() -> Iterator[Launch]:
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.startswith("_"):
            yield from importlib.import_module(f"matpac_fast.kernels.{module.name}").AOT


LAUNCHES = list(launches())


@pytest.fixture(scope="module", autouse=True)
def compile_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile into pytest's own cache: a second run costs only ptxas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
        yield


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.name)
def test_compiles_without_spills(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {capability: compile_ahead(launch, capability) for capability in SHARED_LIMIT}
    with capsys.disabled():
        print(f"\n  {launch.name:<44}", end="")
        for capability, cost in costs.items():
            print(f" | sm_{capability}: {cost.registers:>3} regs {cost.shared:>6} B {cost.spills} spilt", end="")
    for capability, cost in costs.items():
        where = f"{launch.name} for sm_{capability}"
        assert cost.spills == 0, f"{where} spills {cost.spills} bytes"
        assert cost.shared <= SHARED_LIMIT[capability], f"{where} takes {cost.shared} bytes of shared memory"
        assert cost.registers <= launch.max_registers, f"{where} takes {cost.registers} registers"


def test_every_kernel_is_listed() -> None:
    """A kernel without a launch in its module's AOT list would escape the test above."""
    from triton.runtime.jit import JITFunction

    listed = {launch.kernel.fn.__qualname__ for launch in LAUNCHES}
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.startswith("_"):
            continue
        for name, value in vars(importlib.import_module(f"matpac_fast.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                assert name in listed, f"matpac_fast.kernels.{module.name}.{name} is not in its AOT list"
