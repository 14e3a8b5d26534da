"""Audio of several kinds, good and bad, and what a corpus made of it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile

from matpac_fast.audio import container

RATE = 16_000
GOOD = ("a.wav", "b/c.flac", "b/d.WAV", "b/e.ogg", "z.wav")
REASONS = {
    "bad/empty.wav": "empty: a file of 0 bytes",
    "bad/flat.wav": "silent: within -70 dBFS of its mid-line throughout",
    "bad/half.wav": "truncated: its header says",
    "bad/link.wav": "cannot be opened: No such file",
    "bad/nan.wav": "not finite: NaN or infinite samples",
    "bad/page.mp3": "unreadable",
    "bad/quiet.wav": "silent: within -70 dBFS of its mid-line throughout",
    "bad/short.wav": "too short: 0.003 s, less than 0.1 s",
    "bad/song.m4a": "unreadable" if container.is_available() else "no decoder for .m4a files",
}


def make(folder: Path) -> Path:
    """Good files of several kinds, 4.6 s together, and one of each bad kind."""
    (folder / "b").mkdir()
    (folder / "bad").mkdir()
    random = np.random.default_rng(0)

    def noise(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
        return random.normal(0, 0.1, (round(seconds * rate), channels)).clip(-0.9, 0.9)

    soundfile.write(folder / "a.wav", noise(1.0, RATE), RATE)
    soundfile.write(folder / "b/c.flac", noise(1.2, 96_000, 2), 96_000)
    soundfile.write(folder / "b/d.WAV", noise(0.4, 8_000), 8_000, format="WAV")
    soundfile.write(folder / "b/e.ogg", noise(1.0, 44_100), 44_100)
    soundfile.write(folder / "z.wav", noise(1.0, RATE) * 12, RATE, subtype="FLOAT")
    bad = folder / "bad"
    soundfile.write(bad / "short.wav", noise(0.003, RATE), RATE)
    soundfile.write(bad / "quiet.wav", noise(1.0, RATE) * 1e-4, RATE, subtype="FLOAT")
    soundfile.write(bad / "flat.wav", np.full(RATE, 0.25), RATE)
    soundfile.write(bad / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (bad / "half.wav").write_bytes((folder / "a.wav").read_bytes()[:9000])
    (bad / "empty.wav").touch()
    (bad / "page.mp3").write_text("<html>not found</html>")
    (bad / "song.m4a").write_bytes(bytes(100))
    (bad / "link.wav").symlink_to("nowhere.wav")
    (folder / "notes.txt").write_text("no audio")
    return folder


def rows(path: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(path).to_pylist()}


def snapshot(out: Path, times: bool = True) -> dict[str, tuple]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(p.relative_to(out)): (p.read_bytes(), p.stat().st_mtime_ns if times else 0) for p in files}
