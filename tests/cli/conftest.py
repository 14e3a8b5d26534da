"""A corpus on disk, of clips that take milliseconds to train on."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from matpac_fast.audio.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for i, seconds in enumerate((0.2, 0.5, 0.6, 0.7, 0.8)):
        noise = rng.uniform(-0.5, 0.5, int(16_000 * seconds))
        soundfile.write(folder / "audio" / f"{i}.wav", noise, 16_000)
    prepare(folder / "audio", folder / "corpus")
    return str(folder / "corpus")
