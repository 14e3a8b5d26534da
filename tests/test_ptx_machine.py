"""benchmarks/ptx, which runs kernels from their PTX: it computes what a GPU computes, and tells what it would leave to
chance."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import machine
from ptx.arithmetic import COMPARISONS, fma32, from_bf16, operation, to_bf16, to_tf32
from ptx.decode import decode
from ptx.memory import Fault, Global, wavefronts
from ptx.report import Report
from ptx.source import parse
from torch import Tensor

KERNEL = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 out,
    .param .u32 n
)
{{
    .reg .pred %p<9>;
    .reg .b32 %r<30>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r3, memory;
    add.s32 %r4, %r3, %r2;
{body}
    ret;
}}
"""


def launch(body: str, out: Tensor, *, threads: int = 64, blocks: int = 1, shared: int = 1024) -> Report:
    """In `body` %r1 is the thread, %r2 four times it, %rd1 `out`, %rd3 the thread's word in it; %r3 and %r4 are the
    same of shared memory."""
    (kernel,) = parse(KERNEL.format(body=body)).values()
    memory, report = Global(), Report(kernel, blocks)
    memory.add(out.data_ptr(), out.nbytes, out)
    params = out.data_ptr().to_bytes(8, "little") + out.numel().to_bytes(4, "little")
    machine.run(decode(kernel), kernel, params, (blocks, 1, 1), threads, shared, memory, report=report)
    return report


def words(n: int = 64) -> Tensor:
    return torch.full((n,), -1, dtype=torch.int32)


NEIGHBOUR = "st.shared.b32 [%r4], %r1;\n{}\nxor.b32 %r5, %r2, {};\nadd.s32 %r6, %r3, %r5;\nld.shared.b32 %r7, [%r6];\n"


def test_threads_see_what_others_wrote_before_a_barrier():
    out = words()
    launch(NEIGHBOUR.format("bar.sync 0;", 128) + "st.global.b32 [%rd3], %r7;", out)
    assert out.tolist() == [thread ^ 32 for thread in range(64)]
    launch(NEIGHBOUR.format("bar.warp.sync -1;", 4) + "st.global.b32 [%rd3], %r7;", out)
    assert out.tolist() == [thread ^ 1 for thread in range(64)]


HALF_LEAVES = "setp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\n"
FAULTS = {
    "no barrier": (NEIGHBOUR.format("", 128), "read: another thread .* no barrier lies between"),
    "a warp's barrier for two": (NEIGHBOUR.format("bar.warp.sync -1;", 128), "no barrier lies between"),
    "a write after a read": (
        NEIGHBOUR.format("bar.sync 0;", 128) + "st.shared.b32 [%r4], %r7;",
        "written: another thread .* no barrier lies between",
    ),
    "two values in one place": ("st.shared.b32 [%r3], %r1;", "written: another thread"),
    "never written": ("ld.shared.b32 %r7, [%r4];", "nothing has written"),
    "past shared memory": ("st.shared.b32 [%r4+1024], %r1;", "of which a block has 1024"),
    "misaligned": ("st.shared.b32 [%r4+2], %r1;", "no multiple of 4"),
    "past the end": ("st.global.b32 [%rd3+4], %r1;", "4 bytes at .* nobody's"),
    "before the beginning": ("ld.global.b32 %r7, [%rd3+-4];", "nobody's"),
    "misaligned globally": ("ld.global.v2.b32 {%r7, %r8}, [%rd3];", "no multiple of 8"),
    "some leave": (HALF_LEAVES + "bar.sync 0;", "32 threads ended, and the others"),
    "two barriers": (
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra other;\nbar.sync 0;\nbra end;\nother:\nbar.sync 0;\nend:\n",
        "wait at different barriers",
    ),
    "a part of a warp": (
        "setp.lt.u32 %p1, %r1, 7;\n@%p1 shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;",
        "not all lanes of a warp",
    ),
    "a copy not waited for": (
        "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;",
        "ends with copies under way",
    ),
    "no end": ("again:\nbra again;", "does not end"),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_what_a_gpu_leaves_to_chance_is_told(body, message, monkeypatch):
    monkeypatch.setattr(machine, "STEPS", 1000)
    with pytest.raises(Fault, match=f"(?s){message}"):
        launch(body, words())


def test_blocks_that_write_to_one_place():
    body = "mov.u32 %r7, %ctaid.x;\nst.global.b32 [%rd3], %r7;"
    with pytest.raises(Fault, match="global memory is written"):
        launch(body, words(), blocks=2)
    launch(body.replace("mov.u32 %r7, %ctaid.x", "mov.b32 %r7, 5"), out := words(), blocks=2)
    assert out.tolist() == [5] * 64  # the same from all


def test_a_copy_is_there_when_it_is_waited_for():
    copy = "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\n{}\nld.shared.b32 %r7, [%r4];\n"
    then = "st.global.b32 [%rd3], %r7;"
    out = torch.arange(64, dtype=torch.int32)
    launch(copy.format("cp.async.wait_group 0;") + "add.s32 %r7, %r7, 1;\n" + then, out)
    assert out.tolist() == list(range(1, 65))
    launch(copy.format("cp.async.wait_group 1;") + then + "\ncp.async.wait_group 0;", out)
    assert (out == -1).all()  # what lies there until then is poison


def test_threads_part_and_meet():
    """Each adds up the numbers below its own; an even one then takes another way than an odd one."""
    body = """
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
again:
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 bra done;
    add.s32 %r5, %r5, %r6;
    add.s32 %r6, %r6, 1;
    bra again;
done:
    and.b32 %r7, %r1, 1;
    setp.eq.b32 %p2, %r7, 1;
    @!%p2 bra even;
    neg.s32 %r5, %r5;
even:
    bar.sync 0;
    st.global.b32 [%rd3], %r5;
    """
    launch(body, out := words())
    assert out.tolist() == [(-1) ** t * sum(range(t)) for t in range(64)]


def test_accesses_are_counted():
    strided = "shl.b32 %r5, %r1, {};\nadd.s32 %r6, %r3, %r5;\nst.shared.b32 [%r6], %r1;"
    for shift, turns in ((2, 1), (3, 2), (7, 32)):
        report = launch(strided.format(shift), words(), threads=32, shared=4096)
        assert (report.by_kind()["shared store"].taken, report.by_kind()["shared store"].least) == (turns, 1)
    scattered = "shl.b32 %r5, %r1, 5;\ncvt.u64.u32 %rd4, %r5;\nadd.s64 %rd5, %rd1, %rd4;\nst.global.b32 [%rd5], %r1;"
    traffic = launch(scattered, words(256), threads=32).by_kind()["global store"]
    assert (traffic.warps, traffic.taken, traffic.least) == (1, 32, 4)
    lanes = np.arange(32)
    assert wavefronts(lanes * 16, 16, lanes) == (4, 4)
    assert wavefronts(lanes * 0, 16, lanes) == (1, 1)  # one place for all


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"tex\.2d.* is not known here"):
        launch("tex.2d.v4.f32.f32 {%r5, %r6, %r7, %r8}, [%rd1, {%r1, %r2}];", words())


# arithmetic


def nearest(x: Fraction) -> np.float32:
    """float32, halves to even."""
    guess = np.float32(float(x))
    near = [np.nextafter(guess, np.float32(way)) for way in (-math.inf, math.inf)] + [guess]
    return min(near, key=lambda y: (abs(Fraction(float(y)) - x), int(y.view(np.uint32)) & 1))


def test_fma_rounds_once():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 4000)).astype(np.float32)
    c = (-a.astype(np.float64) * b * (1 + 2.0 ** -random.integers(1, 60, 4000))).astype(np.float32)
    c[::2] = (random.standard_normal(2000) * 2.0 ** random.integers(-40, 40, 2000)).astype(np.float32)
    # Half a last bit and a little: rounded to float64 in between, it would be just half.
    a[0], b[0], c[0] = 1 + 2.0**-23, 1 + 2.0**-23, 2.0**25
    a[1], b[1], c[1] = 2.0**-30, 2.0**-30, 1 + 2.0**-23
    exact = [
        nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert np.array_equal(fma32(a, b, c), np.array(exact))


def test_sixteen_bits_are_rounded_as_torch_rounds_them():
    x = torch.cat([torch.randn(5000), torch.tensor([math.inf, -math.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 0.0])])
    assert torch.equal(torch.from_numpy(from_bf16(to_bf16(x.numpy()))), x.bfloat16().float())
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], np.float32))))
    tf32 = to_tf32(np.array([1 + 2.0**-11, 1 - 2.0**-13], np.float32)).view(np.float32)
    assert tf32.tolist() == [1 + 2.0**-10, 1.0]  # halves away from zero


U32 = {
    ("prmt", "b32"): ((0x33221100, 0x77665544, 0x8254), 0x00225544),
    ("bfe", "u32"): ((0xABCD1234, 8, 12), 0xD12),
    ("shl", "b32"): ((1, 32), 0),
    ("shr", "u32"): ((0x80000000, 40), 0),
    ("mul", "hi", "u32"): ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mad", "lo", "u32"): ((0x10000, 0x10001, 7), 0x10007),
    ("add", "bf16x2"): ((0x3F803F80, 0x40003F80), 0x40404000),
}


@pytest.mark.parametrize(("opcode", "case"), U32.items(), ids=[".".join(opcode) for opcode in U32])
def test_integers(opcode, case):
    (arguments, expected), found = case, operation(opcode, len(case[0]))
    assert found is not None
    value = np.asarray(found[0](*(np.array([x], np.uint32) for x in arguments)))
    assert value.astype(np.uint32).tolist() == [expected]


def test_signed_integers():
    def of(*opcode: str, **values: int) -> int:
        function, _, _ = operation(opcode, len(values)) or (None, None, None)
        assert function is not None
        return int(function(*(np.array([x], np.int32) for x in values.values()))[0])

    assert of("shr", "s32", x=-5, by=40) == -1
    assert of("bfe", "s32", x=0xF0, start=4, length=4) == -1
    assert of("div", "s32", x=-7, y=2) == -3
    assert of("mul", "hi", "s32", x=-(2**31), y=2) == -1


def test_comparisons_with_nan():
    nan, one = np.array([np.nan], np.float32), np.array([1], np.float32)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        assert name in COMPARISONS
        for suffix, expected in (("", False), ("u", True)):
            function, _, _ = operation(("setp", name + suffix, "f32"), 2) or (None, None, None)
            assert function is not None
            assert bool(function(nan, one)[0]) == expected
    for modifiers, expected in (((), 1.0), (("NaN",), math.nan)):
        function, _, _ = operation(("max", *modifiers, "f32"), 2) or (None, None, None)
        assert function is not None
        assert np.array_equal(function(nan, one), [expected], equal_nan=True)
