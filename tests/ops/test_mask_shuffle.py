"""ops.mask_shuffle: the same bits as the reference, which are those of splitmix64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from matpac_fast import ops, reference, use_backend

integers = st.integers(-(2**65), 2**65)
int64 = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def by_hand(seed: int, step: int, index: int, n_tokens: int) -> list[int]:
    """The definition in Python integers, which never wrap on their own."""

    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    stream = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ step % 2**64) ^ index % 2**64)
    bits = max(1, (n_tokens - 1).bit_length())

    def key(token: int) -> int:
        noise = splitmix64((stream + token) % 2**64)
        signed = noise - 2**64 if noise >= 2**63 else noise
        return (signed >> bits << bits) | token

    return sorted(range(n_tokens), key=key)


def test_splitmix64_gives_its_published_sequence():
    """The first outputs of Vigna's splitmix64.c for the seed 1234567, as listed on Rosetta Code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = torch.tensor(1234567)
    got = []
    for _ in published:
        got.append(int(reference.splitmix64(state)) % 2**64)
        state = state + (0x9E3779B97F4A7C15 - 2**64)
    assert got == published


@given(seed=integers, step=integers, index=st.lists(int64, max_size=4), n_tokens=st.integers(1, 70))
def test_equals_the_definition(seed, step, index, n_tokens):
    want = [by_hand(seed, step, i, n_tokens) for i in index]
    for name in ("cpp", "reference"):
        with use_backend(name):
            got = ops.mask_shuffle(seed, step, torch.tensor(index, dtype=torch.int64), n_tokens)
        assert got.dtype == torch.int64
        assert got.shape == (len(index), n_tokens)
        assert got.tolist() == want


@pytest.mark.parametrize("n_tokens", [1, 2, 190, 256, 257, 1250])
def test_the_model_s_sizes(n_tokens):
    index = torch.arange(-3, 700, 7)
    with use_backend("cpp"):
        got = ops.mask_shuffle(7, 12345, index, n_tokens)
    assert torch.equal(got, reference.mask_shuffle(7, 12345, index, n_tokens))
    assert torch.equal(got.sort(1).values, torch.arange(n_tokens).expand_as(got))


def test_rows_depend_on_their_index_alone(backend):
    index = torch.tensor([5, 1, 5, 9])
    rows = ops.mask_shuffle(0, 3, index, 30)
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1:2], ops.mask_shuffle(0, 3, index[1:2], 30))
    strided = torch.stack([index, index], 1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(rows, ops.mask_shuffle(0, 3, strided, 30))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpp"):
            got = ops.mask_shuffle(1, 2, torch.arange(300), 190)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, reference.mask_shuffle(1, 2, torch.arange(300), 190))


def test_permutations_are_uniform():
    """Chi-squared of the token at each place, and of neighbours' order across samples, steps and seeds."""
    n, draws = 10, 20_000
    for rows in (
        ops.mask_shuffle(0, 0, torch.arange(draws), n),
        torch.cat([ops.mask_shuffle(0, step, torch.zeros(1, dtype=torch.int64), n) for step in range(draws // 4)]),
        torch.cat([ops.mask_shuffle(seed, 0, torch.zeros(1, dtype=torch.int64), n) for seed in range(draws // 4)]),
    ):
        counts = torch.stack([torch.bincount(rows[:, place], minlength=n) for place in range(n)]).double()
        expected = rows.shape[0] / n
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        # (n - 1) ** 2 = 81 degrees of freedom, standard deviation 12.7.
        assert 30 < chi2 < 145
        after = (rows[1:, 0] == rows[:-1, 0]).double().mean()
        assert abs(float(after) - 1 / n) < 5 * np.sqrt(0.1 * 0.9 / rows.shape[0])


def test_opcheck(backend):
    op = torch.ops.matpac_fast.mask_shuffle.default
    torch.library.opcheck(op, (-1, 2**62, torch.arange(3), 17))
    torch.library.opcheck(op, (0, 1, torch.arange(12).view(4, 3)[:, 1], 4))


def test_compiles_once_for_every_step_and_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.mask_shuffle, fullgraph=True, dynamic=True, backend=counter)
    for step, batch in ((5, 3), (6, 4), (7, 5), (-8, 6)):
        index = torch.arange(batch)
        assert torch.equal(compiled(3, step, index, 30), ops.mask_shuffle(3, step, index, 30))
    assert counter.frame_count <= 2  # a negative step may take a graph of its own


def test_unchanged_input_and_empty_batch(backend):
    index = torch.arange(4)
    ops.mask_shuffle(0, 0, index, 5)
    assert torch.equal(index, torch.arange(4))
    assert ops.mask_shuffle(0, 0, index[:0], 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0, torch.arange(3), 0), ValueError, "n_tokens is 0; expected at least 1"),
        ((0, 0, torch.arange(3), -5), ValueError, "n_tokens is -5"),
        ((0, 0, torch.arange(3.0), 5), TypeError, "index is .*float32.*expected one of int64"),
        ((0, 0, torch.arange(4).view(2, 2), 5), ValueError, r"index is \(2, 2\)"),
        ((0, 0, 3, 5), TypeError, "index is a int; expected a torch.Tensor"),
        ((0.5, 0, torch.arange(3), 5), TypeError, "seed is a float; expected a Python int"),
        ((0, torch.tensor(1), torch.arange(3), 5), TypeError, r"step is a Tensor; expected a Python int.*int\(step\)"),
        ((0, 0, torch.arange(3), True), TypeError, "n_tokens is a bool"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, int, Tensor, int], error, message):
    with pytest.raises(error, match=message):
        ops.mask_shuffle(*arguments)
