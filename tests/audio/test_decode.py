"""Decoding: good files of every format pass, and each kind of bad file is an AudioError with its own reason."""

from __future__ import annotations

import errno
import io
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from matpac_fast.audio import decode, mpeg
from matpac_fast.audio.decode import read_audio, read_blocks, resample
from matpac_fast.audio.find import find_audio
from matpac_fast.errors import AudioError, DiskError

RATE = 44_100
SECONDS = 3
# name: format, subtype, rate, channels, options
FORMATS = {
    "wav": ("WAV", "PCM_16", RATE, 2, {}),
    "wav24": ("WAV", "PCM_24", 96_000, 2, {}),
    "wav-float": ("WAV", "FLOAT", RATE, 1, {}),
    "wav-16k": ("WAV", "PCM_16", 16_000, 1, {}),
    "wav-8k": ("WAV", "PCM_U8", 8_000, 1, {}),
    "wav-6-channels": ("WAVEX", "PCM_16", 48_000, 6, {}),
    "adpcm": ("WAV", "IMA_ADPCM", RATE, 2, {}),
    "gsm": ("WAV", "GSM610", 8_000, 1, {}),  # cannot be sought in
    "rf64": ("RF64", "PCM_16", RATE, 2, {}),
    "w64": ("W64", "PCM_16", RATE, 2, {}),
    "aiff": ("AIFF", "PCM_16", RATE, 2, {}),
    "au": ("AU", "PCM_16", RATE, 2, {}),
    "caf": ("CAF", "PCM_16", RATE, 2, {}),
    "flac": ("FLAC", "PCM_16", RATE, 2, {}),
    "ogg": ("OGG", "VORBIS", RATE, 2, {}),
    "opus": ("OGG", "OPUS", 48_000, 2, {}),
    "mp3-vbr": ("MP3", "MPEG_LAYER_III", RATE, 2, {"bitrate_mode": "VARIABLE", "compression_level": 0.5}),
    "mp3-cbr": ("MP3", "MPEG_LAYER_III", RATE, 2, {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),
    "mp3-22k": ("MP3", "MPEG_LAYER_III", 22_050, 1, {"bitrate_mode": "CONSTANT", "compression_level": 0.5}),
}
TAGS = b"ID3\x03\0\0\0\0\x0f\x00" + bytes(15 * 128)
WITH_FOOTER = b"ID3\x04\0\x10\0\0\x0f\x00" + bytes(15 * 128) + b"3DI\x04\0\x10\0\0\x0f\x00"
EXACT = {"wav", "wav24", "wav-float", "wav-16k", "wav-6-channels", "rf64", "w64", "aiff", "au", "caf", "flac"}


def tones(rate: int, channels: int) -> np.ndarray:
    """Low tones that every codec keeps, over a little noise, different in each channel: (S, channels)."""
    t = np.arange(rate * SECONDS) / rate
    rng = np.random.default_rng(channels)
    waves = [0.3 * np.sin(2 * np.pi * 220 * (c + 1) * t) + 0.01 * rng.standard_normal(len(t)) for c in range(channels)]
    return np.stack(waves, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    files = {}
    for name, (container, subtype, rate, channels, options) in FORMATS.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, tones(rate, channels), rate, format=container, subtype=subtype, **options)
        files[name] = buffer.getvalue()
    files["mp3-vbr-bare"] = without_header(files["mp3-vbr"])
    files["mp3-cbr-bare"] = without_header(files["mp3-cbr"])
    return files


def without_header(mp3: bytes) -> bytes:
    """The file without its first frame, which holds the Xing header with the length."""
    return mp3[mp3.index(mp3[:2], 4) :]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_mono_at_16_khz(tmp_path, good, name):
    wave = read_audio(write(tmp_path / name, good[name]))
    _, _, rate, channels, _ = FORMATS[name]
    expected = soxr.resample(tones(rate, channels).astype(np.float64).mean(axis=1), rate, 16_000, quality="HQ")
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    error = wave[: len(expected)] - expected[: len(wave)]
    if name in EXACT:
        assert len(wave) == len(expected)
        assert np.abs(error).max() < 2**-15
    else:  # lossy: padded to a block of the codec, and close enough to hear that it is the same
        assert 0 <= len(wave) - len(expected) < 0.06 * 16_000
        assert error.std() < 0.3 * expected.std()


@pytest.mark.parametrize("name", [*FORMATS, "mp3-cbr-bare"])
def test_blocks_of_any_length_join_to_the_whole_to_the_bit(tmp_path, good, name):
    path = write(tmp_path / name, good[name])
    whole = read_audio(path)
    for seconds in (0.0501, 1.0, 100.0):
        blocks = list(read_blocks(path, block_seconds=seconds))
        assert len(blocks) > 0.3 * SECONDS / seconds
        assert all(len(b) for b in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_blocks_need_memory_for_a_block_not_for_the_file(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(tones(8_000, 2), (100, 1)), 8_000)
    tracemalloc.start()
    try:
        total = sum(len(block) for block in read_blocks(tmp_path / "long.wav", block_seconds=1.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 100 * SECONDS * 16_000
    assert peak < 1 << 20  # the file is 19 MB as float32


def test_resample_does_what_reading_at_that_rate_does(tmp_path, good):
    path = write(tmp_path / "x.flac", good["flac"])
    np.testing.assert_array_equal(resample(read_audio(path, RATE), RATE, 16_000), read_audio(path))


def cut(data: bytes, amount: int) -> bytes:
    return data[: len(data) - amount]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + np.random.default_rng(0).bytes(4000) + data[at + 4000 :]


def gap(data: bytes) -> bytes:
    return data[: len(data) // 2] + data[len(data) // 2 + 4000 :]


def with_value(data: bytes, value: float) -> bytes:
    """A float WAV with one sample replaced."""
    return data[:-4000] + struct.pack("<f", value) + data[-3996:]


BAD = {
    # Cut off. libsndfile itself reads all of these without an error.
    "wav half": ("wav", half, "truncated: its header says"),
    "wav 1000 bytes short": ("wav", lambda d: cut(d, 1000), "truncated: its header says"),
    "adpcm half": ("adpcm", half, "truncated: its header says"),
    "gsm half": ("gsm", half, "truncated: its header says"),
    "rf64 half": ("rf64", half, "truncated: its header says"),
    "w64 half": ("w64", half, "truncated: its header says"),
    "aiff half": ("aiff", half, "truncated: its header says"),
    "au half": ("au", half, "truncated: its header says"),
    "caf 1000 bytes short": ("caf", lambda d: cut(d, 1000), "truncated: its header says"),
    "ogg half": ("ogg", half, "truncated: it ends inside an Ogg page"),
    "ogg one byte short": ("ogg", lambda d: cut(d, 1), "truncated: it ends inside an Ogg page"),
    "opus half": ("opus", half, "truncated: it ends inside an Ogg page"),
    "opus one byte short": ("opus", lambda d: cut(d, 1), "truncated: it ends inside an Ogg page"),
    "mp3 half": ("mp3-vbr", half, "truncated or damaged: its header says"),
    "mp3 2000 bytes short": ("mp3-cbr", lambda d: cut(d, 2000), "truncated or damaged: its header says"),
    "mp3 without header 9999 bytes short": (
        "mp3-cbr-bare",
        lambda d: cut(d, 9999),
        "truncated: it ends inside an MPEG frame",
    ),
    "mp3 without header one byte short": ("mp3-cbr-bare", lambda d: cut(d, 1), "truncated: it ends inside an MPEG"),
    "mp3 of variable rate without header": (
        "mp3-vbr-bare",
        lambda d: d,
        "an MP3 of variable bit rate without a Xing header",
    ),
    "such a mp3 behind zeros": ("mp3-vbr-bare", lambda d: bytes(4096) + d, "an MP3 of variable bit rate without"),
    "such a mp3 behind tags with a footer": ("mp3-vbr-bare", lambda d: WITH_FOOTER + d, "an MP3 of variable bit rate"),
    # Several in one file.
    "ogg and another": ("ogg", lambda d: d + d, "several Ogg streams, one after the other: libsndfile reads the first"),
    "opus and another": ("opus", lambda d: d + d, "several Ogg streams, one after the other"),
    "mp3 and another": ("mp3-vbr", lambda d: d + d, "an MP3 of variable bit rate without a Xing header, or several"),
    "mp3 and another behind tags": ("mp3-cbr", lambda d: d + b"TAG" + bytes(125) + TAGS + d, "an MP3 of variable bit"),
    # Damaged in the middle.
    "ogg garbage": ("ogg", garbage, "truncated or damaged: its header says"),
    "ogg gap": ("ogg", gap, "truncated or damaged: its header says"),
    "opus garbage": ("opus", garbage, "truncated or damaged: its header says"),
    "flac garbage": ("flac", garbage, "damaged: libsndfile says"),
    "flac half": ("flac", half, "damaged: libsndfile says"),
    "mp3 zeros": ("mp3-cbr", lambda d: d[: len(d) // 2] + bytes(5000) + d[len(d) // 2 + 5000 :], "damaged"),
    "flac header only": ("flac", lambda d: d[:44], "truncated or damaged: its header says"),
    # No audio at all.
    "wav header only": ("wav", lambda d: d[:44], "empty: a header and no samples"),
    "aiff header only": ("aiff", lambda d: d[:44], "unreadable"),
    "nothing": ("wav", lambda d: b"", "empty: a file of 0 bytes"),
    "one byte": ("wav", lambda d: b"x", "unreadable"),
    "random bytes": ("wav", lambda d: np.random.default_rng(1).bytes(10_000), "unreadable"),
    "html": ("wav", lambda d: b"<!doctype html><html><body>404</body></html>" * 20, "unreadable"),
    # Samples that cannot be.
    "nan": ("wav-float", lambda d: with_value(d, float("nan")), "not finite"),
    "infinite": ("wav-float", lambda d: with_value(d, float("-inf")), "not finite"),
    "1e29": ("wav-float", lambda d: with_value(d, 1e29), "out of range: a sample of 1e+29"),
    "-1e29": ("wav-float", lambda d: with_value(d, -1e29), "out of range: a sample of 1e+29"),
    "sample rate of 3 Hz": ("wav", lambda d: d[:24] + b"\3\0\0\0" + d[28:], "damaged: a sample rate of 3 Hz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(tmp_path, good, name):
    base, spoil, reason = BAD[name]
    path = write(tmp_path / "bad.mp3", spoil(good[base]))
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {reason}")
    assert "\n" not in message
    with pytest.raises(AudioError):
        list(read_blocks(path, block_seconds=0.25))


def test_what_only_the_resampler_takes_beyond_the_limit_is_refused_too(tmp_path):
    """Its filter overshoots at edges: a square wave just within the limit is beyond it at another rate."""
    square = decode.MAX_PEAK * 0.98 * np.sign(np.sin(np.arange(RATE) / 16)).astype(np.float32)
    soundfile.write(tmp_path / "square.wav", square, RATE, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "square.wav", RATE)).max() <= decode.MAX_PEAK
    for seconds in (0.25, 10.0):
        with pytest.raises(AudioError, match=r"square\.wav: out of range: a sample of 3\d\.\d at 16000 Hz; full scale"):
            list(read_blocks(tmp_path / "square.wav", block_seconds=seconds))


ODD = {
    "tags after flac": ("flac", lambda d: d + b"TAG" + bytes(125)),
    "tags after mp3": ("mp3-vbr", lambda d: d + b"TAG" + bytes(125)),
    "tags before mp3": ("mp3-vbr", lambda d: TAGS + d),
    "tags around mp3 without header": ("mp3-cbr-bare", lambda d: TAGS + d + b"TAG" + bytes(125)),
    "tags with a footer before mp3 without header": ("mp3-cbr-bare", lambda d: WITH_FOOTER + d),
    "zeros before mp3 without header": ("mp3-cbr-bare", lambda d: bytes(4096) + d),
    "half a frame before mp3 without header": ("mp3-cbr-bare", lambda d: d[200:]),
    "junk after wav": ("wav", lambda d: d + b"junk" * 100),
    "junk after ogg": ("ogg", lambda d: d + b"junk" * 100),
    "wav from a pipe (ffmpeg)": ("wav", lambda d: d[:4] + b"\xff" * 4 + d[8:40] + b"\xff" * 4 + d[44:]),
    "wav from a pipe (sox)": ("wav", lambda d: d[:40] + struct.pack("<I", 0x7FFFF000 - 36) + d[44:]),
    "wav that counts its header": ("wav", lambda d: d[:40] + struct.pack("<I", len(d)) + d[44:]),
    "flac from a pipe": ("flac", lambda d: d[:21] + bytes([d[21] & 0xF0]) + bytes(4) + d[26:]),
    "mp3 that counts a frame too many": ("mp3-cbr", lambda d: more_frames(d)),
}


def more_frames(mp3: bytes) -> bytes:
    """One frame more in the Info header, and nothing of LAME, whose exact length would take precedence."""
    at = mp3.index(b"Info") + 8
    frames = struct.unpack(">I", mp3[at : at + 4])[0]
    mp3 = mp3[:at] + struct.pack(">I", frames + 1) + mp3[at + 4 :]
    at = mp3.index(b"LAME")
    return mp3[:at] + bytes(36) + mp3[at + 36 :]


@pytest.mark.parametrize("name", ODD)
def test_odd_but_whole_files_are_read_to_the_end(tmp_path, good, name):
    base, change = ODD[name]
    path = write(tmp_path / "odd.mp3", change(good[base]))
    assert abs(len(read_audio(path)) - SECONDS * 16_000) < 0.06 * 16_000
    with decode.AudioFile(path) as file:
        assert file.seconds == (None if name == "flac from a pipe" else pytest.approx(SECONDS, abs=0.3))


def test_a_recording_that_ends_between_two_ogg_pages_is_read(tmp_path, good):
    at = good["ogg"].rindex(b"OggS")
    assert len(read_audio(write(tmp_path / "live.ogg", good["ogg"][:at]))) > 16_000


@pytest.mark.parametrize(
    ("flags", "chained"),
    [([2, 0, 1, 1, 5], False), ([2, 2, 0, 0, 4, 4], False), ([2, 0, 4, 2, 0], True), ([2, 1, 5, 2], True)],
)
def test_ogg_pages_that_go_on_with_a_packet_begin_no_stream(tmp_path, flags, chained):
    """1: goes on with a packet, as pictures take several pages; 2: begins a stream, of sound or video; 4: ends it."""
    pages = (b"OggS\0" + bytes([flag]) + bytes(20) + b"\x02\xff\x10" + b"OggS" + bytes(267) for flag in flags)
    assert decode._is_chained(write(tmp_path / "x.ogg", b"".join(pages))) == chained


def test_bare_mp3_is_counted_frame_by_frame(tmp_path, good):
    walked = mpeg.walk(write(tmp_path / "x", good["mp3-vbr-bare"]))
    assert walked is not None
    assert not walked.cut
    assert 0 <= walked.samples - SECONDS * RATE < 3 * mpeg.FRAME
    for other in ("mp3-vbr", "mp3-22k", "wav"):
        assert mpeg.walk(write(tmp_path / "x", good[other])) is None


def test_one_sample_is_audio_at_its_own_rate_and_none_at_a_lower_one(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 16_000)
    assert read_audio(tmp_path / "one.wav").tolist() == [0.5]
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 44_100)
    with pytest.raises(AudioError, match="empty: 1 samples at 44100 Hz are none at 16000 Hz"):
        read_audio(tmp_path / "one.wav")


def test_what_is_no_file_is_said_plainly(tmp_path, monkeypatch, good):
    with pytest.raises(AudioError, match="cannot be opened: No such file"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="a folder, not an audio file"):
        read_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioError, match="not a regular file"):
        read_audio(tmp_path / "pipe.wav")
    monkeypatch.setattr(decode.container, "is_available", lambda: False)
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    write(tmp_path / "like mp3.m4a", good["mp3-cbr"])  # as libsndfile takes something in any long file
    for name in ("song.m4a", "like mp3.m4a"):
        with pytest.raises(AudioError, match=r"no decoder for \.m4a files: pip install .*, or convert it"):
            read_audio(tmp_path / name)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    soundfile.write(tmp_path / "mine.wav", np.zeros(100), 16_000)
    monkeypatch.setattr(decode, "open", refuse, raising=False)  # file modes do not stop root
    with pytest.raises(AudioError, match="cannot be opened: Permission denied"):
        read_audio(tmp_path / "mine.wav")


@pytest.mark.parametrize("when", ["opened", "header", "samples", "end"])
def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch, when):
    """Where libsndfile gets no bytes it says "Format not recognised", or "System error"."""
    path, n_opened = tmp_path / "x.wav", 0
    soundfile.write(path, np.zeros(1_000), 16_000)

    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path, *args, **kwargs):
        nonlocal n_opened
        n_opened += 1
        return open(path, "rb") if n_opened == 1 and when != "opened" else Failing(path)

    def read(self, *args, **kwargs):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(decode, "open", opened, raising=False)
    if when == "header":
        path.write_bytes(b"none of its bytes")
    if when == "samples":
        monkeypatch.setattr(soundfile.SoundFile, "read", read)
    if when == "end":  # where an Ogg file is looked through for a second stream
        soundfile.write(path, np.zeros(1_000), 16_000, format="OGG")
    with pytest.raises(DiskError, match=r"x\.wav: cannot be read: Input/output error$"):
        read_audio(path)


def test_a_disk_that_failed_once_is_not_taken_for_damage(tmp_path, monkeypatch):
    path = tmp_path / "x.flac"
    soundfile.write(path, np.zeros(1_000), 16_000)

    def read(self, *args, **kwargs):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(DiskError, match=r"x\.flac: cannot be read: the system gave an error, and then none"):
        read_audio(path)


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    soundfile.write(path, np.full(100, 0.25), 16_000)
    found = find_audio(tmp_path)
    assert [os.fsencode(p) for p in found] == [path]
    assert len(read_audio(found[0])) == 100


def test_find_audio_is_sorted_takes_any_case_and_survives_links(tmp_path, monkeypatch):
    for name in ("b/z.WAV", "b/a.Flac", "a.ogg", "notes.txt", "c/deep/x.OPUS", "c/no.m4a", "wav", "locked/y.wav"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.mp3").write_bytes(b"")
    data = tmp_path / "data"
    (data / "c" / "deep" / "up").symlink_to(data)  # a loop
    (data / "again").symlink_to(data / "b")  # b a second time
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "broken.wav").symlink_to(data / "nothing")
    (data / "self.wav").symlink_to(data / "self.wav")
    (data / "folder.wav").mkdir()

    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    errors = []
    found = find_audio(data, on_error=lambda path, error: errors.append((path.name, error.strerror)))
    names = [str(p.relative_to(data)) for p in found]
    assert names == [
        "a.ogg",
        "b/a.Flac",
        "b/z.WAV",
        "broken.wav",
        "c/deep/x.OPUS",
        "c/no.m4a",
        "link/far.mp3",
        "self.wav",
    ]
    assert sorted(errors) == [
        ("folder.wav", "a folder by the name of an audio file"),
        ("locked", "Permission denied"),
        ("up", "a link to a folder that holds it"),
    ]


def test_find_audio_needs_a_folder(tmp_path):
    with pytest.raises(AudioError, match="no such folder"):
        find_audio(tmp_path / "missing")
    (tmp_path / "file.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="not a folder"):
        find_audio(tmp_path / "file.wav")


def test_versions_name_decoder_and_resampler():
    assert decode.decoder_versions() == {
        "soundfile": soundfile.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "soxr": soxr.__version__,
        "quality": "soxr HQ",
    }


@pytest.mark.parametrize(("module", "loader"), [("soundfile", decode._soundfile), ("soxr", decode._soxr)])
def test_a_missing_library_is_named_with_the_command_that_mends_it(monkeypatch, module, loader):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AudioError, match=f"pip install {module}"):
        loader.__wrapped__()
