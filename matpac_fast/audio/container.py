"""The sound of video files, and audio in formats that libsndfile does not know, through PyAV where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import AudioError

# FFmpeg also reads play lists, which may name other files and addresses: only these, from this one file.
_FORMATS = "aac,ac3,amr,ape,asf,avi,eac3,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo,wv"
_LONGEST_GAP = 600.0  # seconds of silence where a file does not say how long it is; more is damage
_SLACK_SECONDS = 0.5  # a container's length and its sound's differ by so much without anything being lost


def is_available() -> bool:
    return importlib.util.find_spec("av") is not None


class Container:
    """The first sound track of a file, under the names that soundfile.SoundFile has for what we use of it."""

    format, extra_info = "AV", ""
    frames = 2**63 - 1  # what is stated is inexact, and checked at the end

    def __init__(self, path: str | os.PathLike[str]):
        import av

        self._path, self._error = path, av.FFmpegError
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            # A title in no UTF-8 is none of our business, and no damage.
            self._container = av.open(os.fspath(path), options=options, metadata_errors="replace")
        except (self._error, UnicodeEncodeError) as error:
            raise AudioError(f"{path}: unreadable: FFmpeg says {_plain(error)}") from None
        streams = self._container.streams.audio
        coded = streams[0].codec_context if streams else None  # None of a codec that FFmpeg does not know
        if coded is None or not coded.sample_rate or not coded.channels:
            self._container.close()
            raise AudioError(
                f"{path}: unreadable: its sound has a codec that FFmpeg lacks, or states no rate or channels"
                if streams
                else f"{path}: no sound track"
            )
        stream, self.samplerate, self.channels = streams[0], coded.sample_rate, coded.channels
        length = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        self.seconds = float(length) if length else None
        # Packed: of eight planes or more PyAV 18.1 does not find the end, and the process dies.
        self._resampler = av.AudioResampler(format="flt", layout=stream.layout, rate=self.samplerate)
        self._read = 0
        self._decoded = self._decode(stream)
        self._rest = np.empty((0, self.channels), np.float32)

    def read(self, frames: int, **_: Any) -> np.ndarray:
        """The next (frames, channels) float32, fewer at the end."""
        parts, n = [self._rest], len(self._rest)
        while n < frames and (block := next(self._decoded, None)) is not None:
            parts.append(block)
            n += len(block)
        joined = np.concatenate(parts)
        self._rest = joined[frames:]
        self._read += min(frames, n)
        missing = (self.seconds or 0.0) - self._read / self.samplerate
        if n < frames and missing > _SLACK_SECONDS:
            raise AudioError(f"{self._path}: truncated: {missing:.1f} s of {self.seconds:.1f} s are missing")
        return joined[:frames]

    def close(self) -> None:
        self._container.close()

    def _decode(self, stream: Any) -> Iterator[np.ndarray]:
        done, begin = 0, None
        try:
            for frame in itertools.chain(self._container.decode(stream), [None]):  # None: what is left
                if frame is not None and frame.time is not None:
                    begin = frame.time if begin is None else begin
                    gap = frame.time - begin - done / self.samplerate
                    if gap > (self.seconds or _LONGEST_GAP):
                        raise ValueError(f"its time stamps leap by {gap:.1f} s")
                    if gap > _SLACK_SECONDS:  # as where a recorder lost its signal: what comes after keeps its time
                        yield np.zeros((round(gap * self.samplerate), self.channels), np.float32)
                        done += round(gap * self.samplerate)
                for converted in self._resampler.resample(frame):
                    if (converted.layout.nb_channels, converted.sample_rate) != (self.channels, self.samplerate):
                        raise ValueError("its channels or its rate change")
                    done += converted.samples
                    yield converted.to_ndarray().reshape(-1, self.channels)
        except (self._error, ValueError) as error:
            raise AudioError(f"{self._path}: damaged: FFmpeg says {_plain(error)}") from None


def _plain(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
