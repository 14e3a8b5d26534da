"""Streams: blocks of any size give the embeddings of the whole clip, in memory that does not grow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matpac_fast.embedding import Embeddings
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.vit_encoder import Encoder

SECOND = 16_000


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=32, depth=2, num_heads=2)  # sees 0.64 s at once


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32) / 10


def blocks(wave: np.ndarray, rng: np.random.Generator, most: int) -> list[np.ndarray]:
    cuts = np.cumsum(rng.integers(0, most, size=len(wave) // max(1, most // 4) + 2))
    return np.split(wave, cuts[cuts < len(wave)])


def joined(found: list[Embeddings]) -> list[torch.Tensor]:
    return [torch.cat([getattr(f, name) for f in found]) for name in ("values", "start", "end")]


@pytest.mark.parametrize("rate", [SECOND, 8_000, 44_100])
@pytest.mark.parametrize("remainder", ["keep", "pad", "merge", "drop"])
@pytest.mark.parametrize(("support", "hop"), [(0.5, None), (0.5, 0.2), (0.3, 0.45), (1.0, 0.3337), (None, None)])
def test_blocks_of_any_size_equal_the_whole_clip(encoder, rate, remainder, support, hop):
    rng = np.random.default_rng(rate)
    options = dict(temporal_support=support, hop=hop, remainder=remainder)
    exact = 0.5 + 0.2 * 4  # ends with a window
    for i, seconds in enumerate((1e-4, 0.01, 0.5, exact, *rng.uniform(0.3, 4.0, size=3))):
        wave = noise(max(1, round(seconds * rate)), seed=i)
        pool, layers = (("mean", "last"), ("none", "all"))[i % 2]
        if len(wave) * SECOND < rate:
            continue  # not one sample at the encoder's rate
        want = encoder.embed(wave, rate, pool=pool, layers=layers, **options)
        stream = encoder.stream(rate, pool=pool, layers=layers, **options)
        found = [stream.push(block) for block in blocks(wave, rng, 1 + len(wave) // 3)] + [stream.finish()]
        values, start, end = joined(found)
        torch.testing.assert_close(values, want.values, rtol=0, atol=1e-5)
        assert torch.equal(start, want.start)  # to the bit, since tables are joined by them
        assert torch.equal(end, want.end)


def test_embeddings_come_as_soon_as_their_windows_are_full(encoder):
    stream = encoder.stream(SECOND, temporal_support=0.5, hop=0.25)
    counts = [len(stream.push(block)) for block in np.split(noise(SECOND), 8)]
    assert counts == [0, 0, 0, 1, 0, 1, 0, 1]
    stream = encoder.stream(SECOND, temporal_support=0.5)
    found = list(stream.over(np.split(noise(SECOND + 80), [100, 9_000])))
    assert [len(f) for f in found] == [1, 1, 1]
    assert float(found[-1].end[-1]) == 1.005
    # Frames of a stream without windows come with every native piece.
    stream = encoder.stream(SECOND, pool="none")
    counts = [len(stream.push(block)) for block in np.split(noise(2 * SECOND), 10)]
    assert counts == [0, 0, 0, 4, 0, 0, 4, 0, 0, 4]
    assert len(stream.finish()) == 1


@pytest.mark.parametrize("support", [0.5, None])
def test_memory_does_not_grow(encoder, support):
    stream = encoder.stream(44_100, temporal_support=support, hop=support and 0.25, remainder="merge")
    block = noise(4_410)
    longest = 0
    for _ in range(300):
        stream.push(block)
        longest = max(longest, len(stream._buffer))
    assert longest < 1.2 * SECOND * 4  # bytes
    assert float(stream.finish().end[-1]) == 30.0


def test_a_block_is_copied_once_however_much_waits(encoder, peak_growth):
    stream = encoder.stream(SECOND, temporal_support=600.0)
    stream.push(noise(300 * SECOND))  # 18 MiB
    block = noise(160)

    def push() -> None:
        for _ in range(100):
            stream.push(block)

    push()  # the buffer has room from here on
    assert peak_growth(push) < 4


def test_a_callers_block_may_be_filled_anew(encoder):
    wave, block = noise(SECOND), np.empty(1_000, np.float32)
    stream = encoder.stream(SECOND, temporal_support=0.5)
    found = []
    for part in wave.reshape(16, 1_000):
        block[:] = part
        found.append(stream.push(block))
    values = joined([*found, stream.finish()])[0]
    torch.testing.assert_close(values, encoder.embed(wave, SECOND, temporal_support=0.5).values, rtol=0, atol=1e-5)


def test_pcm_and_tensors_stream_alike(encoder):
    pcm = (noise(SECOND) * 32768).astype(np.int16)
    want = encoder.embed(pcm, SECOND, temporal_support=0.3).values
    for kind in (pcm, torch.from_numpy(pcm), pcm.astype(np.float64) / 32768):
        found = list(encoder.stream(SECOND, temporal_support=0.3).over([kind[:5_000], kind[5_000:]]))
        torch.testing.assert_close(joined(found)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("support", [0.5, None])
def test_the_applications_defaults_change_nothing(encoder, support):
    pcm = (noise(2 * SECOND + 100) * 32768).astype(np.int16)
    want = encoder.embed(pcm, SECOND, support).values
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device("cuda") in a service with the encoder on the CPU
            stream = encoder.stream(SECOND, support)
            found = [stream.push(pcm[:100]), stream.push(pcm[100:]), stream.finish()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert not len(found[0])
    torch.testing.assert_close(joined(found)[0], want, rtol=0, atol=1e-5)
    for part in found:
        assert [part.values.dtype, part.start.dtype, part.end.dtype] == [torch.float32, torch.float64, torch.float64]
        assert {t.device.type for t in (part.values, part.start, part.end)} == {"cpu"}


def test_bad_blocks_and_ended_streams_say_so(encoder):
    stream = encoder.stream(SECOND, temporal_support=0.1)
    with pytest.raises(AudioError, match=r"block is \(2, 800\); expected \(S,\), mono"):
        stream.push(np.zeros((2, 800), np.float32))
    with pytest.raises(AudioError, match="block holds NaN"):
        stream.push(np.full(800, np.nan, np.float32))
    stream.push(noise(2_000))  # goes on as if they had not been
    assert float(stream.finish().end[-1]) == 0.125
    for more in (lambda: stream.push(noise(8)), stream.finish):
        with pytest.raises(ConfigError, match="finished"):
            more()
    with pytest.raises(AudioError, match="no audio"):
        encoder.stream(SECOND).finish()
    for rate in (-1, 44.1, float("inf")):
        with pytest.raises(ConfigError, match=f"sample_rate is {rate}; expected Hz, from 1000 to 1000000"):
            encoder.stream(rate)
    with pytest.raises(ConfigError, match="temporal_support is 0"):
        encoder.stream(SECOND, temporal_support=0)
