"""Copies in host memory, packed into one block where they come from a GPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from matpac_fast.train.host import copies_on_host, places_for


def tensors(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(5, 3, generator=generator),
        torch.tensor(7.0),
        torch.randn(2, 0),
        torch.randn(3, 4, generator=generator).T,
        torch.arange(5),
        torch.randn(33, generator=generator).bfloat16(),
        torch.tensor([True, False]),
        torch.randn(17, generator=generator).double(),
    ]
    return [tensor.to(device) for tensor in made]


def test_copies_of_the_host_s_own():
    given = tensors()
    copies = copies_on_host(given)
    for tensor, copied in zip(given, copies, strict=True):
        assert torch.equal(tensor, copied)
        assert not copied.numel() or tensor.data_ptr() != copied.data_ptr()
    assert copies_on_host([]) == []


def test_places_in_a_block_keep_to_themselves(tmp_path):
    given = tensors()
    block = torch.full((64 * len(given) * 3,), 255, dtype=torch.uint8)
    room = sum(-(-tensor.nbytes // 64) * 64 for tensor in given)
    places = places_for(given, block[:room])
    for tensor, place in zip(given, places, strict=True):
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
        assert place.is_contiguous()
        assert place.data_ptr() % place.element_size() == 0
        place.copy_(tensor)
    assert all(torch.equal(tensor, place) for tensor, place in zip(given, places, strict=True))
    assert (block[room:] == 255).all()
    # As a checkpoint writes them, which takes no tensors that overlap.
    save_file({str(i): place for i, place in enumerate(places)}, tmp_path / "copies.safetensors")
    read = load_file(tmp_path / "copies.safetensors")
    assert all(torch.equal(tensor, read[str(i)]) for i, tensor in enumerate(given))


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned_and_no_views_of_it():
    given = tensors("cuda")
    copies = copies_on_host(given)
    for tensor in given:
        tensor.zero_()
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(tensors(), copies, strict=True))
    assert all(copied.is_pinned() for copied in copies if copied.numel())
