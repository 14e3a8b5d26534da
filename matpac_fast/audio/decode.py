"""Audio files in, float32 mono out: soundfile decodes, soxr HQ resamples, and what came out wrong is an AudioError."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AudioError, DiskError
from . import container, mpeg

QUALITY = "HQ"  # of soxr; another one changes embeddings
MAX_PEAK = 32.0  # +30 dBFS; float files beyond it hold garbage, or integers that were never scaled to [-1, 1]
BLOCK_SECONDS = 10.0
_BLOCK = 1 << 24  # samples of all channels decoded at a time, at most
RATES = (1_000, 1_000_000)  # Hz; a header that says less or more is damaged

_UNCODED = {".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph"}
_CODED = {".flac", ".ogg", ".oga", ".opus", ".mp3"}
AUDIO_SUFFIXES = frozenset(_UNCODED | _CODED)
# What libsndfile has no decoder for, and PyAV has, where it is installed. Found all the same, so that whoever has a
# folder of it learns why.
_VIDEO = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".3gp", ".mpg", ".mpeg"}
NO_DECODER = frozenset({".m4a", ".aac", ".wma", ".amr", ".ape", ".wv", ".ac3", ".mka"} | _VIDEO)

# libsndfile mends the sizes of a truncated file in silence, but keeps a log of it.
_SIZE = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_SIZE_SLACK = 64  # bytes; many writers count a header or a padding byte too many
_SIZE_UNKNOWN = 0x7FFF0000  # recorders that write to a pipe state sizes from here up, for want of the real one
_CUT_OGG = ("Junk after the last page", "ended unexpectedly without an End-Of-Stream")
_FRAMES_UNKNOWN = 2**62  # a FLAC that was written to a pipe
_SYSTEM_ERROR = 2  # of libsndfile: a call of the system's failed


class AudioFile:
    """An audio file, opened to be read once from beginning to end.

    Attributes:
        path: as given.
        sample_rate, channels: of the file.
        seconds: that the header states; None where it does not.
        frames: samples a channel read so far, at the rate of the file.

    Raises:
        AudioError: no audio that can be read; the message is one line, "path: reason".
        DiskError: an AudioError; what failed is the reading, which says nothing of the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.frames = 0
        self._check()
        self._file = self._open()
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        if not RATES[0] <= self.sample_rate <= RATES[1]:
            self._file.close()
            raise self._error(f"damaged: a sample rate of {self.sample_rate} Hz")
        stated = self._file.frames
        self.seconds: float | None = stated / self.sample_rate if 0 <= stated < _FRAMES_UNKNOWN else None
        if isinstance(self._file, container.Container):
            self.seconds = self._file.seconds

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, sample_rate: int = 16_000, block_seconds: float = BLOCK_SECONDS) -> Iterator[np.ndarray]:
        """The mono mix, resampled, as float32 blocks of about `block_seconds`; see `read_blocks`."""
        blocks = resampled(self._mono(block_seconds), self.sample_rate, sample_rate, self.path)
        if self.sample_rate == sample_rate:
            yield from blocks  # checked already
        else:
            yield from (self._checked(block, sample_rate) for block in blocks)

    def _mono(self, block_seconds: float) -> Iterator[np.ndarray]:
        """Mono blocks at the rate of the file, checked; the checks of the whole come after the last block."""
        soundfile, _ = _soundfile()
        # A damaged header may promise a thousand channels, for whose samples there is no memory.
        n = max(1, min(round(block_seconds * self.sample_rate), _BLOCK // self.channels))
        promised = self._file.frames
        # To the end that the header states and no further: tags may follow, which a decoder takes for damage. Of Ogg
        # one frame more, for only then does libsndfile note in its log that the end is missing.
        more = 1 if self._file.format == "OGG" else 0
        while left := promised - self.frames:
            try:
                wanted = n if left > n else left + more
                block = self._file.read(wanted, dtype="float32", always_2d=True)  # (frames, channels)
            except soundfile.LibsndfileError as error:
                raise self._failed(error, f"damaged: libsndfile says {_plain(error.error_string)}") from None
            if not len(block):
                break
            self.frames += len(block)
            yield self._mix(block)
        try:
            self._check_length(promised)
        except OSError as error:
            raise self._not_read(error) from None

    def _mix(self, block: np.ndarray) -> np.ndarray:
        mono = block[:, 0].copy()  # (frames,)
        with np.errstate(invalid="ignore", over="ignore"):  # said below, by name
            for channel in range(1, self.channels):
                mono += block[:, channel]
            if self.channels > 1:
                mono /= self.channels
        return self._checked(mono, self.sample_rate)

    def _checked(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """A stretch (S,) as it is at `rate`: a resampler overshoots, so that what was within the limit may leave it."""
        peak = max(wave.max(initial=0), -wave.min(initial=0))
        if not np.isfinite(peak):
            raise self._error("not finite: NaN or infinite samples")
        if peak > MAX_PEAK:
            raise self._error(
                f"out of range: a sample of {peak:.3g} at {rate} Hz; full scale is 1, the limit {MAX_PEAK:g}"
            )
        return wave

    def _open(self) -> Any:
        foreign = self.path.suffix.lower() in NO_DECODER
        if foreign and container.is_available():
            return container.Container(self.path)
        soundfile, forward = _soundfile()
        try:
            file = forward(os.fsencode(self.path))
        except soundfile.LibsndfileError as error:
            raise self._failed(error, self._unreadable(error.error_string)) from None
        if foreign and file.format == "MP3":  # which something in any long file looks like
            file.close()
            raise self._error(self._unreadable(""))
        return file

    def _check(self) -> None:
        """What can be said before libsndfile is asked, whose own messages about it are vague."""
        opened = False
        try:
            found = os.stat(self.path)
            if stat.S_ISDIR(found.st_mode):
                raise self._error("a folder, not an audio file")
            if not stat.S_ISREG(found.st_mode):
                raise self._error("not a regular file")
            with open(self.path, "rb") as file:
                opened = True
                file.read(1)
        except OSError as error:
            raise self._not_read(error, "read" if opened else "opened") from None
        if found.st_size == 0:
            raise self._error("empty: a file of 0 bytes")

    def _check_length(self, promised: int) -> None:
        log = self._file.extra_info
        if self.frames == 0 and not 0 < promised < _FRAMES_UNKNOWN:
            raise self._error("empty: a header and no samples")
        for declared, actual in _SIZE.findall(log):
            if int(actual) + _SIZE_SLACK < int(declared) < _SIZE_UNKNOWN:
                raise self._error(f"truncated: its header says {declared} bytes, the file holds {actual}")
        if all(line in log for line in _CUT_OGG):
            raise self._error(f"truncated: it ends inside an Ogg page, after {self.frames / self.sample_rate:.2f} s")
        if self._file.format == "OGG" and _is_chained(self.path):
            raise self._error(
                f"several Ogg streams, one after the other: libsndfile reads the first, {self.frames} frames; join "
                "them, e.g. ffmpeg -i OLD.ogg NEW.flac"
            )
        mp3 = self._file.format == "MP3"
        if mp3 and (walked := mpeg.walk(self.path)) is not None:
            self._check_walk(walked)  # the frames promised are only an estimate
        elif promised < _FRAMES_UNKNOWN and promised - self.frames > (mpeg.FRAME if mp3 else 0):
            # Some writers of MP3 count one MPEG frame too many.
            raise self._error(f"truncated or damaged: its header says {promised} frames, {self.frames} were read")

    def _check_walk(self, walked: mpeg.Walk) -> None:
        if walked.cut:
            raise self._error(f"truncated: it ends inside an MPEG frame, after {self.frames / self.sample_rate:.2f} s")
        # A decoder may leave out the first frame or two, which lean on ones that are not there, the header's own, and
        # what the header says that an encoder added at both ends.
        if walked.samples - self.frames > 4 * mpeg.FRAME:
            raise self._error(
                f"an MP3 of variable bit rate without a Xing header, or several joined: libsndfile reads {self.frames} "
                f"frames of {walked.samples}; write it anew, e.g. ffmpeg -i OLD.mp3 -c copy NEW.mp3"
            )

    def _unreadable(self, said: str) -> str:
        if self.path.suffix.lower() in NO_DECODER:
            suffix = self.path.suffix.lower()
            mend = "pip install 'matpac_fast[video]', or convert it, e.g. ffmpeg -i FILE FILE.flac"
            return f"no decoder for {suffix} files: {mend}"
        # For a file that is too short to be an MP3, libsndfile says that it is not there.
        reason = "no audio" if "not exist" in said else f"libsndfile says {_plain(said)}"
        return f"unreadable: {reason}"

    def _failed(self, error: Any, reason: str) -> AudioError:
        """`reason`, unless it was the disk that failed, which libsndfile takes for damage."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
        except OSError as failed:
            return self._not_read(failed)
        if error.code == _SYSTEM_ERROR:  # and the disk answers again
            return DiskError(f"{self.path}: cannot be read: the system gave an error, and then none: try again")
        return self._error(reason)

    def _not_read(self, error: OSError, what: str = "read") -> DiskError:
        return DiskError(f"{self.path}: cannot be {what}: {error.strerror}")

    def _error(self, reason: str) -> AudioError:
        return AudioError(f"{self.path}: {reason}")


def check_samples(peak: float, what: str) -> None:
    """Raise AudioError where the largest sample of `what`, audio in memory, is not finite, or beyond any scale."""
    if not math.isfinite(peak):
        raise AudioError(f"{what} holds NaN or infinite samples")
    if peak > MAX_PEAK:
        raise AudioError(
            f"{what} holds a sample of {peak:.3g}; full scale is 1, the limit {MAX_PEAK:g}: divide by the full scale "
            "of the integers it comes from, or give int16"
        )


def read_blocks(
    path: str | os.PathLike[str], sample_rate: int = 16_000, block_seconds: float = BLOCK_SECONDS
) -> Iterator[np.ndarray]:
    """Decode a file block by block, in memory that does not grow with its length.

    Channels are averaged; the rate is changed by a streaming soxr HQ, so that the blocks joined together are
    `read_audio` to the bit, whatever their length.

    Args:
        path: a file that libsndfile can decode, whatever its name; where PyAV is installed, also video and the like.
        sample_rate: wanted, in Hz.
        block_seconds: of audio decoded at a time.

    Yields:
        (n,) float32, full scale 1, about `block_seconds` long, none empty.

    Raises:
        AudioError: with a one-line reason, while iterating; that a file is cut off or damaged may be known only after
            its last block.

    Caught are: what libsndfile cannot read or finds damaged; fewer frames than the header says; sizes in the header of
    WAV, AIFF, AU, W64, RF64 or CAF that exceed the file by over 64 bytes; Ogg that ends inside a page; MP3 that ends
    over one MPEG frame early, or inside a frame where no header states the length; MP3 of variable bit rate without
    that header, and several Ogg or MP3 streams in one file, which libsndfile cuts short; samples that are not finite,
    or beyond 32 times full scale before or after resampling; no samples.

    Not caught, because the file does not show it: garbage in the middle of uncompressed samples; Ogg that was cut off
    between two pages, which is how live recordings end; MP3 without a stated length cut off between two frames; WAV
    whose header was written to a pipe or states 2 GiB or more, cut off; a CAF that lacks its last few bytes.
    """
    with AudioFile(path) as file:
        yield from file.blocks(sample_rate, block_seconds)


def read_audio(path: str | os.PathLike[str], sample_rate: int = 16_000) -> np.ndarray:
    """Decode a whole file: float32 mono (S,), full scale 1, at `sample_rate` Hz. Raises as `read_blocks` does."""
    return np.concatenate(list(read_blocks(path, sample_rate)))


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """A mono wave (S,) in float32 at another rate, by soxr HQ; equal to what `read_audio` does to a file."""
    return _soxr().resample(wave.astype(np.float32, copy=False), from_rate, to_rate, quality=QUALITY)


def resampled(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int, path: Path) -> Iterator[np.ndarray]:
    """Blocks (n,) of a mono wave in float32, none of them empty, at another rate: joined they are `resample` of the
    whole. Raises AudioError, of `path`, where nothing is left."""
    stream = None if from_rate == to_rate else resampler(from_rate, to_rate)
    taken = given = 0
    for block, last in itertools.chain(((block, False) for block in blocks), [(np.empty(0, np.float32), True)]):
        out = block if stream is None else stream.resample_chunk(block, last=last)
        taken, given = taken + len(block), given + len(out)
        if len(out):
            yield out
    if given == 0:
        raise AudioError(f"{path}: empty: {taken} samples at {from_rate} Hz are none at {to_rate} Hz")


def resampler(from_rate: int, to_rate: int) -> Any:
    """soxr's ResampleStream, whose blocks joined together are what `resample` gives, to the bit."""
    return _soxr().ResampleStream(from_rate, to_rate, 1, dtype="float32", quality=QUALITY)


def decoder_versions() -> dict[str, str]:
    """What decoded and resampled: embeddings depend on it, so it is written beside them."""
    soundfile, _ = _soundfile()
    return {
        "soundfile": soundfile.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "soxr": _soxr().__version__,
        "quality": f"soxr {QUALITY}",
    }


def _is_chained(path: Path) -> bool:
    """Whether an Ogg file goes on with another stream where one has ended, as recorders of radio leave it."""
    begun = False
    with open(path, "rb") as file:
        while len(page := file.read(27)) == 27 and page.startswith(b"OggS"):
            begins = bool(page[5] & 2)
            if begins and begun:
                return True
            begun |= not begins
            file.seek(sum(file.read(page[26])), os.SEEK_CUR)
    return False


def _plain(said: str) -> str:
    """libsndfile's words without the file name, the class of the message and the full stop."""
    return said.strip().removeprefix("Error : ").rstrip(".")


@functools.cache
def _soundfile() -> tuple[Any, Any]:
    """The soundfile module, and a SoundFile that only ever reads forward.

    soundfile seeks after every read, which is slow, skips over holes in damaged Ogg files, and is impossible in some
    formats. It does not where a file says that it cannot be sought in.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise AudioError(f"reading audio needs soundfile and libsndfile ({error}): pip install soundfile") from error

    class Forward(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return soundfile, Forward


@functools.cache
def _soxr() -> Any:
    try:
        import soxr
    except ImportError as error:
        raise AudioError(f"changing the sample rate needs soxr ({error}): pip install soxr") from error
    return soxr
