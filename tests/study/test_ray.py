"""A study on a local Ray of two workers gives what one process gives."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.study.sweep import run_study
from tests.study.test_sweep import config


def test_without_ray_it_is_said(encoder_file, clips, tmp_path, monkeypatch):
    from matpac_fast.study import ray as on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray .*pip install 'matpac_fast\[ray\]'"):
        on_ray.run_study(config(encoder_file, clips), tmp_path)


def test_a_folder_of_something_else_is_refused(encoder_file, clips, tmp_path, monkeypatch):
    from matpac_fast.study import ray as on_ray

    (tmp_path / "settings.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    with pytest.raises(ConfigError, match="holds no study; give a new folder to out"):
        on_ray.run_study(config(encoder_file, clips), tmp_path)


@pytest.mark.slow
def test_two_workers_of_a_local_ray(local_ray, encoder_file, clips, tmp_path, monkeypatch):
    from matpac_fast.study import cache
    from matpac_fast.study import ray as on_ray

    wanted = run_study(config(encoder_file, clips), tmp_path / "here")
    monkeypatch.setattr(cache.Cache, "embed", lambda *_: pytest.fail("embedded here"))
    told = []
    found = on_ray.run_study(
        config(encoder_file, clips), tmp_path / "ray", concurrency=2, progress=lambda *heard: told.append(heard)
    )
    assert ("embedding on the cluster", 8, 8) in told
    for one, two in zip(wanted, found, strict=True):
        torch.testing.assert_close(two.probed.scores[0], one.probed.scores[0], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_what_fails_there_is_the_error_here(local_ray, encoder_file, clips, tmp_path):
    from matpac_fast.study import ray as on_ray

    broken = clips / "1-1.wav"
    kept = broken.read_bytes()
    soundfile.write(broken, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    try:
        with pytest.raises(AudioError, match=broken.name):
            on_ray.run_study(config(encoder_file, clips), tmp_path, concurrency=2)
    finally:
        broken.write_bytes(kept)
