"""The walk over an MP3's frames: every bit rate and sample rate, tags of any size, and who states the length."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from matpac_fast.audio import mpeg

# kbit/s, as ISO/IEC 11172-3 and 13818-3 have them; MPEG-2.5 has those of MPEG-2.
MPEG1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def coded(rate: int, kbits: int, samples: int) -> bytes:
    """Noise at a constant bit rate, and no length in its first frame."""
    least, most = (32, 320) if rate >= 32_000 else (8, 160)
    options = dict(bitrate_mode="CONSTANT", compression_level=min(0.99, (most - kbits) / (most - least)))
    wave, buffer = np.random.default_rng(0).standard_normal(samples) / 10, io.BytesIO()
    soundfile.write(buffer, wave, rate, format="MP3", subtype="MPEG_LAYER_III", **options)
    return buffer.getvalue().replace(b"Info", bytes(4), 1)


def walked(tmp_path, data: bytes) -> mpeg.Walk | None:
    (tmp_path / "x.mp3").write_bytes(data)
    return mpeg.walk(tmp_path / "x.mp3")


@pytest.mark.parametrize("rate", [44_100, 48_000, 32_000, 22_050, 24_000, 16_000, 11_025, 12_000, 8_000])
def test_frames_of_every_bit_rate_are_counted(tmp_path, rate):
    samples, indices = rate // 5, set()
    table, frame = (MPEG1, 1152) if rate >= 32_000 else (MPEG2, 576)
    for kbits in table:
        data = coded(rate, kbits, samples)
        indices.add(data[2] >> 4)
        found = walked(tmp_path, data)
        assert found is not None
        assert not found.cut
        assert found.samples % frame == 0
        assert 0 <= found.samples - samples < 4 * frame
        assert walked(tmp_path, data[:-1]) == mpeg.Walk(found.samples - frame, cut=True)
    assert indices == set(range(1, 15 if rate >= 16_000 else 9))  # MPEG-2.5 ends at 64 kbit/s


@pytest.mark.parametrize("footer", [False, True])
def test_tags_that_are_larger_than_what_is_searched_are_stepped_over(tmp_path, footer):
    """As those with pictures are, in which anything may stand."""
    data = coded(44_100, 64, 20_000)
    size = 1 << 21 | 2 << 14 | 3 << 7 | 5
    head = bytes([4, 0, 0x10 if footer else 0, 1, 2, 3, 5])
    tags = b"ID3" + head + (data * (size // len(data) + 1))[:size] + (b"3DI" + head if footer else b"")
    whole = walked(tmp_path, data)
    assert whole is not None
    assert walked(tmp_path, tags + data) == whole
    assert walked(tmp_path, tags + tags + data) == whole
    assert walked(tmp_path, data + tags + data) == mpeg.Walk(2 * whole.samples, cut=False)


def test_a_header_of_other_encoders_states_the_length_too(tmp_path):
    data = bytearray(coded(44_100, 64, 20_000))
    data[36:40] = b"VBRI"
    assert walked(tmp_path, bytes(data)) is None


@pytest.mark.parametrize("flags", [0, 2])
def test_a_header_that_leaves_out_the_length_states_none(tmp_path, flags):
    data = bytearray(coded(44_100, 64, 20_000))
    whole = walked(tmp_path, bytes(data))
    data[36:44] = b"Info" + flags.to_bytes(4, "big")
    assert walked(tmp_path, bytes(data)) == whole
