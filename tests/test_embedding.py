"""Clips of any lengths through shared batches: lists, paths, properties over lengths and windows, memory that ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from matpac_fast import AudioEncoder, embedding
from matpac_fast.audio.decode import resample
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.vit_encoder import Encoder

SECOND = 16_000


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=32, depth=2, num_heads=2)  # sees 0.64 s at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("waves")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 10


def expected_spans(n: int, size: int, hop: int, remainder: str) -> list[tuple[int, int]]:
    """What `embed` promises, said anew: every hop a window, while one fits; then the remainder."""
    if n <= size:
        return [(0, n)]
    spans = []
    start = 0
    while start + size <= n:
        spans.append((start, start + size))
        start += hop
    if spans[-1][1] < n and start < n:
        if remainder == "merge":
            spans[-1] = (spans[-1][0], n)
        elif remainder != "drop":
            spans.append((start, n))
    return spans


def mixed(remainder: str, layers: str, hop: float | None = None) -> dict[str, object]:
    """A clip whose windows are of several frames, the last of another number of them."""
    return dict(n=23_457, size=0.5, hop=hop, rate=SECOND, channels=1, remainder=remainder, layers=layers, batch_size=3)


@settings(max_examples=60, derandomize=True)
@example(**mixed("keep", "last"))
@example(**mixed("merge", "all"))
@example(**mixed("keep", "all", hop=0.2503))
@given(
    # Of integers from a range hypothesis draws small ones for the most part: hardly a clip had a second window.
    n=st.sampled_from([1, 399, 881, 4_001, 9_999, 16_000, 23_457, 39_999]),
    size=st.sampled_from([0.02, 0.16, 0.25, 0.3337, 0.64, 1.0, 3.0]),
    hop=st.sampled_from([None, 0.1, 0.16, 0.2503, 0.5, 1.7]),
    rate=st.sampled_from([SECOND, 8_000, 44_100]),
    channels=st.integers(1, 3),
    remainder=st.sampled_from(["keep", "pad", "merge", "drop"]),
    layers=st.sampled_from(["last", "all"]),
    batch_size=st.sampled_from([1, 3, 16]),
)
def test_any_clip_at_any_support(encoder, folder, n, size, hop, rate, channels, remainder, layers, batch_size):
    import soundfile

    stereo = noise(n, channels, seed=n)
    soundfile.write(folder / "x.wav", stereo, rate, subtype="FLOAT")
    mono = stereo.mean(1, dtype=np.float64).astype(np.float32)
    wave = mono if rate == SECOND else resample(mono, rate, SECOND)
    if len(wave) == 0:
        return
    options = dict(temporal_support=size, hop=hop, remainder=remainder, layers=layers)
    got = encoder.embed(folder / "x.wav", batch_size=batch_size, **options)

    samples = [round(SECOND * s) for s in (size, size if hop is None else hop)]
    spans = expected_spans(len(wave), *samples, remainder)
    np.testing.assert_allclose(got.start, [a / SECOND for a, _ in spans])
    np.testing.assert_allclose(got.end, [b / SECOND for _, b in spans])
    if remainder != "drop" and samples[1] <= samples[0]:
        assert float(got.end[-1]) == len(wave) / SECOND
    assert torch.isfinite(got.values).all()

    windows = [wave[a:b] for a, b in spans]
    if remainder == "pad":
        windows[-1] = np.pad(windows[-1], (0, max(0, samples[0] - len(windows[-1]))))
    alone = [encoder.embed(window, SECOND, layers=layers, batch_size=1).values for window in windows]
    torch.testing.assert_close(got.values, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_list_is_each_clip_alone(encoder, folder):
    import soundfile

    waves = [noise(n, seed=n) for n in (20_000, 400, 7, 48_123, 20_000, 10_479)]
    soundfile.write(folder / "y.wav", waves[3], SECOND, subtype="FLOAT")
    clips = [waves[0], torch.from_numpy(waves[1]), waves[2].astype(np.float64), folder / "y.wav", *waves[4:]]
    for options in ({}, {"temporal_support": 0.3}, {"temporal_support": 0.3, "hop": 0.11, "pool": "none"}):
        alone = [encoder.embed(wave, SECOND, batch_size=1, **options) for wave in waves]
        for found in (
            encoder.embed(clips, SECOND, batch_size=5, **options),
            list(encoder.embed_many(iter(clips), SECOND, **options)),
        ):
            assert len(found) == len(waves)
            for got, want in zip(found, alone, strict=True):
                torch.testing.assert_close(got.values, want.values, rtol=0, atol=1e-5)
                assert torch.equal(got.start, want.start)
                assert torch.equal(got.end, want.end)
    assert encoder.embed([], SECOND) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [">i2", "<i2", ">f4", ">f8", "f2", np.longdouble, "read-only", "reversed"])
def test_arrays_of_any_byte_order_and_precision(encoder, dtype):
    pcm = (noise(8_000) * 8_192).astype(np.int16)
    want = encoder.embed(pcm, SECOND).values
    if dtype == "read-only":
        wave = np.frombuffer(pcm.tobytes(), np.int16)
    elif dtype == "reversed":
        wave = pcm[::-1].copy()[::-1]
    else:
        wave = (pcm if np.dtype(dtype).kind == "i" else pcm.astype(np.float64) / 32_768).astype(dtype)
    torch.testing.assert_close(encoder.embed(wave, SECOND).values, want, rtol=0, atol=1e-2 if dtype == "f2" else 1e-6)


class Frames(AudioEncoder):
    """Frames of a tenth of a second, as many as fit: the end of a window is not seen."""

    name, sample_rate, embedding_dim, frame_samples, settings = "frames", 1_000, 1, 100, {"kind": "frames"}

    def columns(self, n_samples: int) -> list[int]:
        return [n_samples // 100]

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return pieces.unfold(1, 100, 100).mean(2)[:, None, :, None]


def test_a_frame_ends_with_what_it_saw(encoder):
    found = Frames().embed(noise(390), 1_000, 0.2, pool="none")
    assert list(zip(found.start.tolist(), found.end.tolist(), strict=True)) == [(0, 0.1), (0.1, 0.2), (0.2, 0.3)]
    found = encoder.embed(noise(4_000), SECOND, pool="none")  # the second frame is filled up
    assert list(zip(found.start.tolist(), found.end.tolist(), strict=True)) == [(0, 0.16), (0.16, 0.25)]


class Counting(Encoder):
    """Keeps the shapes, (pieces, frames), of each batch that its network was given."""

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        self.__dict__.setdefault("batches", []).append([(len(g), g.shape[-1]) for g in groups])
        return super().forward_groups(groups, pool, layers)


def counting() -> Counting:
    return Counting(n_frames=64, width=32, depth=1, num_heads=2)


def test_windows_of_all_clips_share_batches():
    encoder = counting()
    # 3 whole windows of 0.32 s and a remainder of 0.16 s each
    encoder.embed([noise(int(1.12 * SECOND), seed=i) for i in range(8)], SECOND, temporal_support=0.32, batch_size=12)
    assert encoder.batches == [[(12, 32)], [(12, 32)], [(8, 16)]]
    # What fills no batch of its own goes together.
    encoder.batches.clear()
    encoder.embed([noise(n, seed=n) for n in (8_000, 9_000, 4_000, 8_000)], SECOND, batch_size=3)
    assert encoder.batches == [[(2, 48), (1, 64)], [(1, 32)]]


def test_windows_of_two_clips_whose_numbers_follow_each_other_go_to_their_own(encoder):
    """The remainder of the second, its window 1, stands behind the only window of the first, its window 0."""
    clips = [noise(2_000, seed=1), noise(5_120 + 2_000, seed=2)]
    found = encoder.embed(clips, SECOND, temporal_support=0.32)
    for got, clip in zip(found, clips, strict=True):
        want = encoder.embed(clip, SECOND, temporal_support=0.32, batch_size=1)
        torch.testing.assert_close(got.values, want.values, rtol=0, atol=1e-5)


def test_a_rare_length_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr(embedding, "_CLIPS_WAITING", 3)
    encoder = counting()
    taken = []

    def clips() -> Iterator[np.ndarray]:
        for i in range(12):
            taken.append(i)
            yield noise(2_000 if i == 0 else 5_000, seed=i)

    found = encoder.embed_many(clips(), SECOND, batch_size=2)
    next(found)
    assert len(taken) <= 5
    assert len(list(found)) == 11
    assert encoder.batches[:3] == [[(2, 32)], [(1, 16)], [(2, 32)]]


@pytest.mark.parametrize("sizes", [dict(temporal_support=0.5, hop=0.25), dict(temporal_support=2.0), {}])
def test_log_mel_is_computed_once_a_clip_where_that_is_exact(encoder, monkeypatch, sizes):
    wave = torch.from_numpy(noise(50_123))
    calls = []
    log_mel = type(encoder).log_mel
    monkeypatch.setattr(type(encoder), "log_mel", lambda self, waves: calls.append(len(waves)) or log_mel(self, waves))
    spans = embedding.Windowing(**sizes).spans(len(wave), SECOND)
    cut = list(encoder.pieces(wave, spans))
    assert calls == [1]
    each = [p for a, b in spans.tolist() for p in encoder.pieces(wave[a:b], np.array([[0, b - a]]))]
    assert len(cut) == len(each)
    for got, want in zip(cut, each, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    # Windows that start between two frames have frames of their own.
    calls.clear()
    list(encoder.pieces(wave, spans + 1))
    assert sum(calls) == len(spans)


def test_what_comes_before_a_bad_clip_is_not_lost(encoder):
    good = [noise(8_000, seed=i) for i in range(3)]
    many = encoder.embed_many([*good, np.full(8, np.nan), good[0]], SECOND, batch_size=16)
    for wave in good:
        torch.testing.assert_close(next(many).values, encoder.embed(wave, SECOND).values, rtol=0, atol=1e-5)
    with pytest.raises(AudioError, match="clip 3 holds NaN"):
        next(many)


class Small(Counting):
    """Fails as an allocator does when more than two pieces come at once."""

    def __init__(self, error: RuntimeError):
        super().__init__(n_frames=64, width=32, depth=1, num_heads=2)
        self.error = error

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        if sum(map(len, groups)) > 2:
            raise self.error
        return super().forward_groups(groups, pool, layers)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: Error code 12"),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    encoder = Small(error)
    wave = noise(4 * SECOND)
    with pytest.warns(UserWarning, match="out of memory") as warned:
        got = encoder.embed(wave, SECOND, temporal_support=0.32, batch_size=8)
    said = [f"out of memory with {n} windows a batch; going on with {n // 2}" for n in (8, 4)]
    assert [str(warning.message) for warning in warned] == said
    assert all(sum(n for n, _ in groups) <= 2 for groups in encoder.batches)
    want = encoder.embed(wave, SECOND, temporal_support=0.32, batch_size=1)
    torch.testing.assert_close(got.values, want.values, rtol=0, atol=1e-5)
    assert len(got) == 13


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Small(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).embed(noise(SECOND), SECOND, 0.2)

    class None_(Small):
        def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
            raise self.error

    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="going on with [12]"):
        None_(torch.OutOfMemoryError("CUDA out of memory")).embed(noise(SECOND), SECOND, 0.2)


def test_a_piece_of_a_long_clip_that_waits_does_not_keep_it_alive(encoder):
    piece = next(encoder.pieces(torch.zeros(60 * SECOND), np.array([[0, 60 * SECOND]])))
    assert piece.untyped_storage().nbytes() > 50 * piece.nbytes
    batches = embedding._Batches(encoder, embedding.Windowing(), 4)
    clip = embedding._Clip(encoder, 60 * SECOND, embedding.Windowing())
    batches.add(piece, clip, 0)
    ((kept, _, _),) = next(iter(batches._waiting.values()))
    assert kept.untyped_storage().nbytes() < 2 * kept.nbytes
    assert torch.equal(kept, piece)


@pytest.mark.parametrize(
    ("audio", "options", "error", "message"),
    [
        ([np.zeros(8), np.full(8, np.inf)], {}, AudioError, "clip 1 holds NaN or infinite"),
        ([np.zeros((2, 8))], {}, AudioError, r"clip 0 is \(2, 8\); expected \(S,\), mono"),
        ([0.5, 0.25], {}, AudioError, "clip 0 is a float; expected a tensor or array"),
        ("no/such/file.wav", {}, AudioError, "no/such/file.wav: cannot be opened"),
        (np.zeros(8, object), {}, AudioError, "embed: wave is object; expected float or int16"),
        (np.zeros(8, np.uint16), {}, AudioError, "embed: wave is uint16; expected float or int16"),
        (np.zeros((4000, 2)), {}, AudioError, r"\(4000, 2\), which looks like samples by channels, .*wave.mean\(1\)"),
        (np.full(8, -20_000.0), {}, AudioError, "a sample of 2e\\+04; full scale is 1, the limit 32: divide by"),
        (np.zeros(8), {"hop": 0.1}, ConfigError, "hop is 0.1 s without a temporal_support; give both, or neither"),
        (np.zeros(8), {"sample_rate": None}, ConfigError, "needs a sample_rate"),
        (np.zeros(8), {"sample_rate": 0}, ConfigError, "sample_rate is 0; expected Hz"),
        (np.zeros(8), {"sample_rate": 44.1}, ConfigError, "sample_rate is 44.1; expected Hz, from 1000 to 1000000"),
        (np.zeros(8), {"sample_rate": float("inf")}, ConfigError, "sample_rate is inf; expected Hz"),
        (np.zeros(8), {"sample_rate": "16000"}, ConfigError, "sample_rate is '16000'; expected Hz"),
        (np.zeros(8), {"temporal_support": "2"}, ConfigError, "temporal_support is '2', a str; expected seconds"),
        (np.zeros(8), {"temporal_support": 1, "hop": [1]}, ConfigError, r"hop is \[1\], a list; expected seconds"),
        (np.zeros(8), {"temporal_support": 0}, ConfigError, "temporal_support is 0 s; expected at least one sample"),
        (
            np.zeros(8),
            {"temporal_support": 1, "hop": 3e-5},
            ConfigError,
            "hop is 3e-05 s; expected at least one sample",
        ),
        (np.zeros(8), {"batch_size": 0}, ConfigError, "batch_size is 0"),
        (np.zeros(8), {"batch_size": 2.5}, ConfigError, "batch_size is 2.5"),
        (np.zeros(8), {"batch_size": 16.0}, ConfigError, "batch_size is 16.0; expected a whole number"),
        (np.zeros(8), {"batch_size": "16"}, ConfigError, "batch_size is '16'; expected a whole number"),
        (np.zeros(1), {"sample_rate": 192_000}, AudioError, "no audio, at 16000 Hz"),
    ],
)
def test_bad_clips_are_named(encoder, audio, options, error, message):
    with pytest.raises(error, match=message):
        encoder.embed(audio, **{"sample_rate": SECOND, **options})


@pytest.mark.parametrize("framing", ["valid", "center"])
def test_the_callers_autocast_changes_nothing(framing):
    encoder = Encoder(n_frames=64, width=32, depth=1, num_heads=2, mean=-7.1, std=4.2, framing=framing)
    want = encoder.embed(noise(20_000), SECOND, 0.3, 0.11).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.embed(noise(20_000), SECOND, 0.3, 0.11).values, want)
        stream = encoder.stream(SECOND, 0.3, 0.11)
        *_, last = stream.over(np.split(noise(20_000), 4))
        torch.testing.assert_close(last.values[-1], want[-1], rtol=0, atol=1e-5)


class Loudness(AudioEncoder):
    """An encoder of another kind, in ten lines: the level of a window in two bands of nothing in particular."""

    name, sample_rate, embedding_dim, min_samples, settings = "loudness", 8_000, 2, 4, {"kind": "loudness"}

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return torch.stack([pieces.abs().mean(-1), pieces.square().mean(-1)], dim=-1)[:, None]


def test_other_encoders_get_windows_batches_and_streams_for_free():
    encoder = Loudness()
    wave = torch.from_numpy(noise(8_000))
    got = encoder.embed(wave, 8_000, temporal_support=0.3)
    want = torch.stack([torch.stack([w.abs().mean(), w.square().mean()]) for w in wave.split(2_400)])
    torch.testing.assert_close(got.values, want)
    assert encoder.embed(wave[:1], 8_000).values[0, 0] == wave[0].abs() / 4
    assert encoder.embed_windows(wave[None]).shape == (1, 2)
    assert len(encoder.id) == 64
    stream = encoder.stream(8_000, temporal_support=0.3)
    found = [stream.push(block).values for block in wave.split(999)] + [stream.finish().values]
    torch.testing.assert_close(torch.cat(found), want)
    with pytest.raises(ConfigError, match="no frame embeddings"):
        encoder.embed(wave, 8_000, pool="none")
    with pytest.raises(ConfigError, match="give temporal_support"):
        encoder.stream(8_000)


def test_a_files_own_rate_is_not_to_be_contradicted(encoder, folder):
    import soundfile

    soundfile.write(folder / "rate.wav", noise(8_000), 44_100)
    want = encoder.embed(folder / "rate.wav").values
    assert torch.equal(encoder.embed(folder / "rate.wav", 44_100).values, want)
    with pytest.raises(ConfigError, match=r"sample_rate is 16000, and .*rate\.wav is at 44100 Hz; leave it out"):
        encoder.embed(str(folder / "rate.wav"), SECOND)
    found = encoder.embed([folder / "rate.wav", noise(8_000)], SECOND)
    torch.testing.assert_close(found[0].values, want, rtol=0, atol=1e-5)
    assert found[1].end.item() == 0.5


@pytest.mark.parametrize(("pool", "wanted"), [("mean", r"\(1, 1, 3\)"), ("none", r"\(1, 1, T, 3\)")])
def test_an_encoder_that_gives_another_width_is_told(pool, wanted):
    class Wide(Loudness):
        name, embedding_dim, frame_samples = "wide", 3, 4

    with pytest.raises(ConfigError, match=rf"wide: forward_pieces gave \(1, 1, 2\) .*expected {wanted}"):
        Wide().embed(noise(8), 8_000, pool=pool)


def test_an_encoder_without_a_network_says_what_to_write():
    with pytest.raises(NotImplementedError, match="AudioEncoder has no forward_pieces; write forward_pieces"):
        AudioEncoder().embed(noise(8), SECOND)


def test_embeddings_are_shown_by_shape_and_times(encoder):
    found = encoder.embed(noise(40_000), SECOND, 1.0)
    assert repr(found) == "<Embeddings of shape (3, 160), float32 on cpu, from 0 to 2.5 s, of 0.5 to 1 s each>"
    assert repr(encoder.embed(noise(40_000), SECOND)).endswith("from 0 to 2.5 s, of 2.5 s each>")
    assert "(0, 160), float32 on cpu>" in repr(encoder.stream(SECOND, 1.0).push(noise(8)))


def test_windows_at_once_where_nobody_says(monkeypatch):
    assert embedding.windows_at_once(torch.device("cpu")) == 16
    assert embedding.windows_at_once(torch.device("cuda", 1)) == 128
    monkeypatch.setattr(embedding, "windows_at_once", lambda device: 3)
    encoder = counting()
    encoder.embed(noise(int(7 * 0.32 * SECOND)), SECOND, temporal_support=0.32)
    assert encoder.batches == [[(3, 32)], [(3, 32)], [(1, 32)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 777, SECOND - 1])
def test_one_sample_that_is_no_number(encoder, bad, at):
    wave = noise(SECOND)
    wave[at] = bad
    with pytest.raises(AudioError, match="NaN or infinite"):
        encoder.embed(wave, SECOND)


def test_a_wave_that_is_the_imaginary_part_of_a_conjugate(encoder):
    """Torch negates it where it is read."""
    wave = torch.complex(torch.zeros(SECOND), torch.from_numpy(noise(SECOND))).conj().imag
    assert torch.equal(encoder.embed(wave, SECOND).values, encoder.embed(wave.clone(), SECOND).values)
