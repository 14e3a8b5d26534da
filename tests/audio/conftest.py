"""A folder of audio of several kinds, to be read by all tests of a file or to be changed by one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.audio import mixed


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    return mixed.make(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def source(audio, tmp_path) -> Path:
    return Path(shutil.copytree(audio, tmp_path / "source", symlinks=True))
