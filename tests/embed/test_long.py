"""Long files stream through a collection: the same rows, in memory that does not grow with their length."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from matpac_fast.audio.decode import read_audio
from matpac_fast.embed import shard, writer
from matpac_fast.embed.extract import embed_collection
from matpac_fast.vit_encoder import Encoder
from tests.embed import crew

RATE = 16_000


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=32, depth=2, num_heads=2)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, seconds, rate in (("a.wav", 7.3, 16_000), ("b.flac", 4.2, 44_100), ("c.wav", 1.9, 8_000)):
        soundfile.write(folder / name, crew.noise(round(seconds * rate)), rate)
    whole = (folder / "a.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: 3 * len(whole) // 4])
    return folder


def rows(out: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for path in sorted(out.glob("shard-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["path"], []).append(row)
    return found


@pytest.mark.parametrize(
    "options",
    [
        dict(temporal_support=0.5, hop=0.2),
        dict(temporal_support=1.0, pool="none", layers="all", remainder="pad"),
        dict(),
        dict(pool="none"),
    ],
    ids=str,
)
def test_long_files_give_the_rows_of_whole_ones(source, encoder, tmp_path, monkeypatch, options):
    monkeypatch.setattr(shard, "LONG_SECONDS", 2.0)
    monkeypatch.setattr(shard, "_BLOCK_SECONDS", (0.5, 0.7))
    monkeypatch.setattr(writer, "_IN_MEMORY", 10_000)  # what was spooled goes over the disk
    monkeypatch.setattr(writer, "_GROUP", 3_000)
    streamed = []
    stream = encoder.stream
    monkeypatch.setattr(encoder, "stream", lambda *args, **rest: (streamed.append(1), stream(*args, **rest))[1])
    report = embed_collection(source, tmp_path / "out", encoder, **options)
    assert len(streamed) == 3  # the last of them the one that is cut off, which is seen only at its end
    got = rows(tmp_path / "out")
    assert sorted(got) == ["a.wav", "b.flac", "c.wav"]
    for name, mine in got.items():
        want = encoder.embed(read_audio(source / name), RATE, **options)
        np.testing.assert_allclose([r["embedding"] for r in mine], want.values.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose([[r["start"], r["end"]] for r in mine], np.stack([want.start, want.end], 1))
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert error["path"] == "cut.wav"
    assert error["reason"].startswith("truncated: its header says")
    assert report.rows == sum(map(len, got.values()))


def test_progress_is_told_within_a_long_file(source, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "LONG_SECONDS", 2.0)
    monkeypatch.setattr(shard, "_BLOCK_SECONDS", (0.5, 0.5))
    told: list[tuple[float, float, int, float]] = []
    embed_collection(
        source,
        tmp_path / "out",
        encoder,
        temporal_support=0.5,
        progress=lambda p: told.append((p.seconds, p.own_seconds, p.files, p.total_seconds)),
    )
    seconds, own, files, total = zip(*told, strict=True)
    assert seconds[0] == own[0] == 0
    assert 0 < seconds[1] < 1  # of the first file, the longest
    assert files[1] == 0
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(seconds))
    assert seconds[-1] == pytest.approx(total[-1])
    assert own[-1] == pytest.approx(total[-1])


def test_an_encoder_that_needs_the_whole_clip_gets_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "LONG_SECONDS", 1.0)
    embed_collection(source, tmp_path / "out", crew.Tiny())
    want = crew.Tiny().embed(source / "a.wav")
    (row,) = rows(tmp_path / "out")["a.wav"]
    assert (row["start"], row["end"]) == (0.0, float(want.end[0]))
    np.testing.assert_allclose(row["embedding"], want.values[0].numpy(), rtol=1e-6)


# Run in a process of its own: it prints the peak of its resident memory, in MiB.
PEAK = """
import resource, sys
from pathlib import Path
import torch
from matpac_fast import AudioEncoder
from matpac_fast.embed.extract import embed_collection
torch.set_num_threads(1)

class Level(AudioEncoder):
    embedding_dim, settings = 64, {}
    def forward_pieces(self, pieces, pool, layers):
        return pieces.abs().mean(-1)[:, None, None].expand(-1, 1, 64)

report = embed_collection(sys.argv[1], sys.argv[2], Level(), 1.0, workers=2)
assert report.failed == 0 and report.rows == int(sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_length_of_a_file(tmp_path):
    """An hour is 230 MiB of float32 at 16 kHz; ten minutes are 38."""
    peaks = {}
    for minutes in (10, 60):
        source = tmp_path / f"{minutes}"
        source.mkdir()
        with soundfile.SoundFile(source / "x.wav", "w", RATE, 1, "PCM_16") as file:
            minute = crew.noise(60 * RATE)
            for _ in range(minutes):
                file.write(minute)
        arguments = [str(source), str(tmp_path / f"out {minutes}"), str(60 * minutes)]
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        peaks[minutes] = float(ran.stdout)
        (source / "x.wav").unlink()
    assert peaks[60] < peaks[10] + 25
