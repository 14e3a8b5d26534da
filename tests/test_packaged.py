"""The pre-trained encoder in the package: it is whole, it is the default everywhere, and it has learnt something."""

import json
import os
import subprocess
import sys

import pytest
import soundfile
import torch
from safetensors import safe_open

import matpac_fast as mf
from matpac_fast import hear
from matpac_fast.cli import main as cli
from matpac_fast.errors import CheckpointError
from matpac_fast.samples import SAMPLE_RATE, load_samples
from matpac_fast.weights import DEFAULT, PACKAGED


@pytest.fixture(scope="module")
def encoder():
    return mf.load_encoder(device="cpu")


def test_it_is_small_whole_and_known_by_name(encoder):
    path = PACKAGED[DEFAULT]
    assert path.stat().st_size <= 15e6
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["matpac_fast"])["id"] == encoder.id
    assert encoder.name == DEFAULT
    assert DEFAULT in mf.list_encoders("matpac-*")
    assert mf.load_encoder(DEFAULT, "cpu").id == encoder.id
    assert all(tensor.isfinite().all() for tensor in encoder.state_dict().values())


def test_a_changed_file_is_refused(tmp_path):
    data = bytearray(PACKAGED[DEFAULT].read_bytes())
    data[-1000] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        mf.load_encoder(tmp_path / "changed.safetensors", "cpu")


def test_it_is_the_default_of_embed_export_and_hear(tmp_path, encoder, capsys):
    notes = load_samples("test")
    soundfile.write(tmp_path / "note.flac", notes.waves[0], SAMPLE_RATE)
    command = ["embed", str(tmp_path), "--out", str(tmp_path / "out"), "--format", "npy", "--device", "cpu"]
    assert cli(command) == 0
    assert hear.load_model().encoder.id == encoder.id
    assert cli(["export", "--torch", str(tmp_path / "encoder.pt2")]) == 0
    wave = torch.as_tensor(notes.waves[0])[None].float()
    exported = torch.export.load(tmp_path / "encoder.pt2").module()(wave)
    torch.testing.assert_close(exported, encoder.embed(wave, SAMPLE_RATE).values[:, 0], rtol=1e-4, atol=1e-4)


def test_three_lines_in_an_empty_folder_without_network(tmp_path):
    lines = """
import torch, matpac_fast as mf
encoder = mf.load_encoder()
print(tuple(encoder.embed(torch.randn(16_000), 16_000).values.shape))
"""
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "(1, 960)"


def test_half_precision_files_are_another_encoder(tmp_path, encoder):
    full = mf.load_encoder("untrained-nano", "cpu")
    full.save(tmp_path / "half.safetensors", dtype="float16")
    half = mf.load_encoder(tmp_path / "half.safetensors", "cpu")
    assert half.id != full.id
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * 4 * sum(
        t.numel() for t in full.state_dict().values()
    )
    wave = torch.randn(8000) / 10
    a, b = (e.embed(wave, 16_000).values for e in (full, half))
    assert 0 < (a - b).abs().max() < 0.01 * a.abs().max()
    # Loaded and saved again it is the same.
    half.save(tmp_path / "again.safetensors", dtype="float16")
    assert mf.load_encoder(tmp_path / "again.safetensors", "cpu").id == half.id
