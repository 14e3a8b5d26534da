"""Video and the formats that libsndfile does not know, through PyAV; without it see test_decode."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import soundfile

from matpac_fast.audio import container
from matpac_fast.audio.decode import AudioFile, read_audio, read_blocks
from matpac_fast.errors import AudioError

av = pytest.importorskip("av")


def write(path, seconds=2.0, rate=44_100, codec="aac", video=False, **options):
    tone = np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate).astype(np.float32) / 2
    with av.open(str(path), "w", options=options) as file:
        if video:
            picture = file.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 32
        stream = file.add_stream(codec, rate=rate, layout="stereo")
        if video:
            for _ in range(round(seconds * 10)):
                for packet in picture.encode(av.VideoFrame(32, 32, "yuv420p")):
                    file.mux(packet)
        for begin in range(0, len(tone), 1024):
            block = np.ascontiguousarray(np.stack([tone[begin : begin + 1024]] * 2))
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, begin
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return path


def remux(path, other, **metadata):
    """The sound of a file, as it is coded, in a container of another kind."""
    with av.open(str(path)) as source, av.open(str(other), "w") as file:
        file.metadata.update(metadata)
        stream = file.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)


@pytest.mark.parametrize(
    ("name", "codec", "video"), [("a.m4a", "aac", False), ("a.mp4", "aac", True), ("a.mkv", "ac3", True)]
)
def test_the_sound_of_a_container(tmp_path, name, codec, video):
    path = write(tmp_path / name, codec=codec, video=video)
    wave = read_audio(path)
    assert len(wave) == pytest.approx(32_000, abs=1_500)  # coders add and drop some hundred samples
    middle = wave[8_000:24_000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() == 440
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(path, block_seconds=0.37))), wave)
    with AudioFile(path) as file:
        assert (file.sample_rate, file.channels) == (44_100, 2)
        if name != "a.mkv":  # which states no length for its sound
            assert file.seconds == pytest.approx(2.0, abs=0.1)


def test_of_several_sound_tracks_the_first_is_read(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        tracks = [file.add_stream("aac", rate=rate, layout="mono") for rate in (16_000, 48_000)]
        for stream, hertz in zip(tracks, (500, 3_000), strict=True):
            for begin in range(0, stream.rate, 1024):
                t = np.arange(begin, begin + 1024) / stream.rate
                tone = np.sin(2 * np.pi * hertz * t).astype(np.float32) / 2
                frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = stream.rate, begin
                for packet in stream.encode(frame):
                    file.mux(packet)
            for packet in stream.encode(None):
                file.mux(packet)
    with AudioFile(tmp_path / "a.mkv") as opened:
        assert opened.sample_rate == 16_000
    wave = read_audio(tmp_path / "a.mkv")
    assert np.abs(np.fft.rfft(wave[:16_000])).argmax() == pytest.approx(500, abs=1)


def test_what_is_wrong_is_said(tmp_path):
    whole = write(tmp_path / "a.mp4", seconds=20.0, video=True).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "random.m4a").write_bytes(np.random.default_rng(0).bytes(5_000))
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    # A play list is not followed, to other files or addresses.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path / 'a.mp4'}\n")
    with av.open(str(tmp_path / "silent.mp4"), "w") as file:
        picture = file.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        for packet in [*picture.encode(av.VideoFrame(32, 32, "yuv420p")), *picture.encode(None)]:
            file.mux(packet)
    for name in ("cut.mp4", "random.m4a", "page.mp4", "list.mp4"):
        with pytest.raises(AudioError, match=f"{name}: (unreadable|truncated|damaged)"):
            read_audio(tmp_path / name)
    with pytest.raises(AudioError, match=r"silent.mp4: no sound track"):
        read_audio(tmp_path / "silent.mp4")


def test_an_end_that_is_missing_is_seen(tmp_path):
    path = write(tmp_path / "a.m4a", seconds=20.0)
    data = bytearray(path.read_bytes())
    # The index comes last and stays; of the sound before it the last half is overwritten.
    begin, end = data.index(b"mdat"), data.rindex(b"moov")
    data[(begin + end) // 2 : end - 4] = bytes(end - 4 - (begin + end) // 2)
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"a.m4a: (truncated|damaged)"):
        read_audio(path)


def test_what_ends_early_and_decodes_well_is_seen_by_its_length(tmp_path):
    """As a download that was broken off, of a file whose index comes first."""
    path = write(tmp_path / "a.mp4", seconds=20.0, codec="ac3", movflags="faststart")
    assert len(read_audio(path)) == pytest.approx(20 * 16_000, abs=1_500)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for seconds in (0.7, 10.0, 15.0):
        with pytest.raises(AudioError, match=r"a.mp4: truncated: 10\.\d s of 20\.\d s are missing"):
            list(read_blocks(path, block_seconds=seconds))


def test_no_more_is_decoded_than_is_asked_for(tmp_path):
    file = container.Container(write(tmp_path / "a.mp4", seconds=20.0))
    for _ in range(3):
        assert file.read(1_000).shape == (1_000, 2)
        assert len(file._rest) < 44_100
    file.close()


@pytest.mark.parametrize("channels", [3, 6, 8])
def test_many_channels_are_those_of_the_file(tmp_path, channels):
    wave = np.random.default_rng(0).standard_normal((16_000, channels)) / 20
    soundfile.write(tmp_path / "a.flac", wave, 16_000)
    remux(tmp_path / "a.flac", tmp_path / "a.mka")
    with AudioFile(tmp_path / "a.mka") as opened:
        assert opened.channels == channels
    np.testing.assert_array_equal(read_audio(tmp_path / "a.mka"), read_audio(tmp_path / "a.flac"))


def test_a_title_may_be_in_any_bytes(tmp_path):
    path = write(tmp_path / "a.m4a")
    remux(path, tmp_path / "b.m4a", title="TITLE")
    named = (tmp_path / "b.m4a").read_bytes()
    assert b"TITLE" in named
    (tmp_path / "b.m4a").write_bytes(named.replace(b"TITLE", b"TIT\xe9E"))
    np.testing.assert_array_equal(read_audio(tmp_path / "b.m4a"), read_audio(path))


def test_a_codec_that_is_not_known_is_a_reason(tmp_path):
    data = write(tmp_path / "a.mkv").read_bytes()
    assert b"A_AAC" in data
    (tmp_path / "b.mkv").write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    with pytest.raises(AudioError, match=r"b.mkv: unreadable: its sound has a codec that FFmpeg lacks"):
        read_audio(tmp_path / "b.mkv")


def test_channels_that_change_are_a_reason(tmp_path):
    """Two streams of AAC, stereo and mono, one after the other."""
    stereo, mono = ((tmp_path / f"{name}.aac") for name in ("stereo", "mono"))
    for path in (stereo, mono):
        with av.open(str(path), "w") as file:
            stream = file.add_stream("aac", rate=16_000, layout=path.stem)
            for i in range(40):
                block = np.zeros((2 if path == stereo else 1, 1024), np.float32)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=path.stem)
                frame.sample_rate, frame.pts = 16_000, 1024 * i
                for packet in stream.encode(frame):
                    file.mux(packet)
            for packet in stream.encode(None):
                file.mux(packet)
    (tmp_path / "both.aac").write_bytes(stereo.read_bytes() + mono.read_bytes())
    with pytest.raises(AudioError, match=r"both.aac: damaged: FFmpeg says"):
        read_audio(tmp_path / "both.aac")


@pytest.mark.parametrize("name", ["a.m4a", "a.mkv", "a.avi", "a.flv"])
def test_damage_is_an_audio_error_and_nothing_else(tmp_path, name):
    data = write(tmp_path / name, seconds=0.3).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 8) if rng.random() < 0.5 else rng.integers(0, min(600, len(data)), 4):
            damaged[at] = rng.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(AudioError):
            read_audio(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts.mpg"])
def test_what_comes_after_a_gap_keeps_its_time(tmp_path, name):
    path, rate = tmp_path / name, 16_000
    tone = (np.sin(np.arange(1024) * 2 * np.pi * 500 / rate) / 2).astype(np.float32)
    with av.open(str(path), "w", format="mpegts" if "ts" in name else None) as file:
        stream = file.add_stream("aac", rate=rate, layout="mono")
        for i in range(60):
            frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 1024 * i + (3 * rate if i >= 30 else 0)
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    wave = read_audio(path)
    assert len(wave) == pytest.approx(60 * 1024 + 3 * rate, abs=4096)
    loud = np.abs(wave[: len(wave) // 800 * 800]).reshape(-1, 800).max(1) > 0.1  # of each 50 ms
    begin, end = np.flatnonzero(~loud[4:-4])[[0, -1]] + 4
    assert begin * 0.05 == pytest.approx(30 * 1024 / rate, abs=0.2)
    assert end * 0.05 == pytest.approx(30 * 1024 / rate + 3, abs=0.2)


def test_time_stamps_that_leap_are_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_LONGEST_GAP", 1.0)
    test_what_comes_after_a_gap_keeps_its_time(tmp_path, "a.mp4")  # which says how long it is
    with pytest.raises(AudioError, match="damaged: FFmpeg says its time stamps leap by 3"):
        test_what_comes_after_a_gap_keeps_its_time(tmp_path, "a.mkv")
