"""How Triton's kernels are run on the CPU: by Triton's interpreter, or from the PTX of a GPU that is not here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

COMPILED_FOR = int(os.environ.get("MATPAC_FAST_COMPILED_FOR", "0"))  # 90 is sm_90; 0: by Triton's interpreter
# Of the tests those that take minutes there, instruction by instruction.
TOO_LONG = ("test_many_prototypes",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if COMPILED_FOR and item.name.startswith(TOO_LONG):
            item.add_marker(pytest.mark.skip(reason="takes ten minutes from PTX; the interpreter runs it"))


@pytest.fixture(autouse=True)
def from_ptx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not COMPILED_FOR:
        yield
        return
    from ptx.triton_kernels import emulated

    from matpac_fast import backend

    with emulated(COMPILED_FOR):  # which imports the kernels before they are told that the CPU runs them
        monkeypatch.setattr(backend, "INTERPRETED", True)
        yield
