"""A live probe: what the encoders of a run are worth on labelled clips, while they are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._cores import n_cores
from ..audio.corpus import to_int16
from ..audio.decode import read_blocks
from ..audio.find import find_audio
from ..audio_encoder import AudioEncoder
from ..config import MatpacConfig
from ..errors import AudioError, ConfigError
from ..nn.statistics import effective_rank
from ..vit_encoder import encoder_of, sizes_of
from ..zoo.statistics import LogMelStatistics
from .probe import linear_probe

# Few strengths and folds, for it is asked again and again; `matpac-fast study` looks closer.
_L2_GRID = (1.0, 0.1, 0.01, 0.001)
_FOLDS = 3
_NEIGHBOURS = 10


def check_folder(folder: str | os.PathLike[str], n_clips: int = 500) -> None:
    """Raise what `LiveProbe` raises of a folder, as far as it shows before a clip is decoded."""
    folder = Path(folder)
    by_label = _by_label(folder)
    chosen = sorted(_evenly(by_label, n_clips).items())
    few = [_too_few(folder / label, len(paths), paths, by_label[label]) for label, paths in chosen if len(paths) < 4]
    _check_labels(folder, len(chosen) - len(few), few)


class LiveProbe:
    """Scores the student's and the teacher's encoder on a folder whose sub-folders are the labels.

    Half of each label's clips, by name, are the training clips of the other half, and the other way round: clips of one
    recording, whose names are mostly alike, seldom stand on both sides. Every clip is decoded once and kept in memory.

    Args:
        folder: of audio; a label needs at least four clips.
        n_clips: use so many at most, as evenly over the labels as they go.
        seconds: of each clip, from its beginning.
        device: where the clips are embedded.
        sample_rate: of the clips as they are embedded, in Hz: the model's.

    Attributes:
        labels: the names of the classes.
        left_out: why files were not used, one line each.

    Raises:
        AudioError: no such folder.
        ConfigError: fewer than two labels with four clips that can be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        n_clips: int = 500,
        seconds: float = 6.08,
        device: str | torch.device = "cpu",
        sample_rate: int = 16_000,
    ):
        folder = Path(folder)
        by_label = _by_label(folder)
        chosen = _evenly(by_label, n_clips)
        self._device, self._sample_rate, self.left_out = torch.device(device), sample_rate, []
        self._waves: list[np.ndarray] = []
        self.labels: list[str] = []
        targets, halves = [], []
        with ThreadPoolExecutor(min(8, n_cores())) as pool:
            for label, paths in sorted(chosen.items()):
                read = list(pool.map(lambda path: _read(path, seconds, sample_rate), paths))
                self.left_out += [str(found) for found in read if isinstance(found, AudioError)]
                waves = [found for found in read if not isinstance(found, AudioError)]
                if len(waves) < 4:
                    self.left_out.append(_too_few(folder / label, len(waves), paths, by_label[label]))
                    continue
                targets += [len(self.labels)] * len(waves)
                halves += [2 * i >= len(waves) for i in range(len(waves))]
                self.labels.append(label)
                self._waves += waves
        _check_labels(folder, len(self.labels), self.left_out)
        self._targets, self._second = (torch.tensor(known, device="cpu") for known in (targets, halves))
        # What is worth as much without learning anything.
        floor = self._score(self._embed(LogMelStatistics()))
        self._floor = {f"statistics_{name}": floor[name] for name in ("knn", "linear")}

    def __len__(self) -> int:
        """Clips."""
        return len(self._waves)

    def __call__(self, state: Mapping[str, Tensor], config: MatpacConfig) -> dict[str, Any]:
        """Accuracies of k nearest neighbours and of a linear probe, and the effective rank (RankMe) of the clips'
        embeddings, of both encoders; NaN where an embedding is not finite. Beside them the accuracies of log-mel
        statistics, which no training changes.

        Args:
            state: weights under `Matpac`'s names: frontend, student and teacher.
            config: the model's.
        """
        found: dict[str, Any] = {"clips": len(self), "labels": len(self.labels)}
        for side in ("student", "teacher"):
            features = self._embed(encoder_of(state, sizes_of(config), side, f"the {side}"))
            scores = self._score(features) if features.isfinite().all() else dict.fromkeys(_SCORES, float("nan"))
            found |= {f"{side}_{name}": value for name, value in scores.items()}
        return found | self._floor

    def _embed(self, encoder: AudioEncoder) -> Tensor:
        """(N, E) on the CPU, the mean over time of each clip."""
        found = encoder.to(self._device).embed_many(self._waves, self._sample_rate)
        return torch.cat([clip.values for clip in found]).cpu()

    def _score(self, features: Tensor) -> dict[str, float]:
        centred = features.double() - features.double().mean(0)
        rank = effective_rank(centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred)
        near = linear = 0
        for test in (self._second, ~self._second):
            sides = features[~test], self._targets[~test], features[test], self._targets[test]
            near += int(_nearest(*sides).sum())
            linear += int(linear_probe(*sides, l2_grid=_L2_GRID, n_folds=_FOLDS).correct.sum())
        return dict(zip(_SCORES, (near / len(self), linear / len(self), rank), strict=True))


_SCORES = ("knn", "linear", "rank")


def _by_label(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in find_audio(folder):
        parts = path.relative_to(folder).parts
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(path)
    return found


def _too_few(label: Path, n: int, chosen: Sequence[Path], there: Sequence[Path]) -> str:
    taken = f" of {len(there)} taken" if len(there) > len(chosen) else ""
    return f"{label}: {n} clip{'s' * (n != 1)}{taken}; a label needs four"


def _check_labels(folder: Path, n: int, left_out: Sequence[str]) -> None:
    if n < 2:
        raise ConfigError(
            f"{folder}: labels with four clips or more: {n}; expected sub-folders of audio, two or "
            f"more, whose names are the labels{': ' + left_out[0] if left_out else ''}"
        )


def _evenly(by_label: Mapping[str, list[Path]], n_clips: int) -> dict[str, list[Path]]:
    """At most `n_clips` of the files, as many of each label as of any other that has them, spread over its names."""
    share, left, waiting = 0, n_clips, len(by_label)
    shares = {}
    for label, paths in sorted(by_label.items(), key=lambda item: len(item[1])):
        share = min(len(paths), left // waiting)
        shares[label] = share
        left, waiting = left - share, waiting - 1
    return {
        label: [by_label[label][i * len(by_label[label]) // share] for i in range(share)]
        for label, share in shares.items()
    }


def _read(path: Path, seconds: float, sample_rate: int) -> np.ndarray | AudioError:
    """The beginning of a clip as int16 at `sample_rate`."""
    wanted, blocks = round(seconds * sample_rate), []
    try:
        for block in read_blocks(path, sample_rate, min(seconds, 10.0)):
            blocks.append(block)
            if sum(map(len, blocks)) >= wanted:
                break
    except AudioError as error:
        return error
    return to_int16(np.concatenate(blocks)[:wanted])[0]


def _nearest(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Which test clips (M,) are classified rightly by their nearest training clips, weighted by their cosine."""
    mean = train.mean(0)
    cosine = F.normalize(test - mean, dim=1) @ F.normalize(train - mean, dim=1).T  # (M, N)
    top, index = cosine.topk(min(_NEIGHBOURS, len(train)), dim=1)
    votes = test.new_zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], torch.exp(top / 0.07))
    return votes.argmax(1) == test_labels
