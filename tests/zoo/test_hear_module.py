"""Encoders of packages that speak the HEAR API, by a small module that does, with its own faults on request."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import textwrap
import types
import weakref

import pytest
import torch

from matpac_fast import hear, load_encoder
from matpac_fast.errors import CheckpointError, ConfigError
from tests.zoo.official import noise

MODULE = """
import torch
from torch import nn


class Model(nn.Module):
    sample_rate, scene_embedding_size, timestamp_embedding_size = 8_000, 6, 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(400, 6)

    def forward(self, audio):  # frames of 50 ms
        return self.linear(audio.unfold(1, 400, 400))


def load_model(path=""):
    torch.manual_seed(0)
    model = Model()
    if path:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


def get_timestamp_embeddings(audio, model):
    found = model(audio)
    times = 25 + 50.0 * torch.arange(found.shape[1])
    return found, times.expand(len(audio), -1)


def get_scene_embeddings(audio, model):
    return model(audio).mean(1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module("name", more code) writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name: str, more: str = "") -> str:
        (tmp_path / f"{name}.py").write_text(MODULE + textwrap.dedent(more), encoding="utf-8")
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def frames(model: torch.nn.Module, wave: torch.Tensor) -> torch.Tensor:
    return model.linear(wave.unfold(0, 400, 400)).detach()


def test_windows_and_frames_are_the_modules(module):
    encoder = load_encoder(f"hear:{module('fake_hear')}", "cpu")
    assert encoder.name == "hear:fake_hear"
    assert (encoder.sample_rate, encoder.embedding_dim, encoder.min_samples) == (8_000, 6, 400)
    assert encoder.settings["min_samples"] == 400  # what is shorter is padded to it, which the id says
    assert encoder.embed(noise(10), 8_000, pool="none").values.shape == (1, 6)
    assert encoder.frame_samples == 400
    assert not any(p.requires_grad for p in encoder.parameters())
    wave = noise(20_000)
    want = frames(encoder.model, wave)
    torch.testing.assert_close(encoder.embed(wave, 8_000).values[0], want.mean(0), rtol=0, atol=1e-6)
    found = encoder.embed(wave, 8_000, pool="none")
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-6)
    assert found.start[:3].tolist() == [0.0, 0.05, 0.1]
    windows = encoder.embed(wave, 8_000, temporal_support=0.5)
    torch.testing.assert_close(windows.values[1], frames(encoder.model, wave[4_000:8_000]).mean(0), rtol=0, atol=1e-6)
    clips = [noise(n, seed=n) for n in (1, 700, 4_000, 4_100, 9_000, 4_000)]
    singles = [encoder.embed(clip, 8_000).values for clip in clips]
    for got, want in zip(encoder.embed(clips, 8_000, batch_size=4), singles, strict=True):
        torch.testing.assert_close(got.values, want, rtol=0, atol=1e-6)


def test_the_shortest_window_is_found_to_the_sample(module):
    encoder = load_encoder(f"hear:{module('fake_hear')}", "cpu")
    wave = noise(1_200)
    want = frames(encoder.model, wave)
    found = encoder.embed(wave, 8_000, temporal_support=0.05)
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        """
        import numpy as np
        Model.sample_rate, Model.scene_embedding_size = np.int64(8_000), np.int32(6)
        torch_scene, torch_frames = get_scene_embeddings, get_timestamp_embeddings
        def get_scene_embeddings(audio, model):
            return torch_scene(audio, model).numpy()
        def get_timestamp_embeddings(audio, model):
            return tuple(found.numpy() for found in torch_frames(audio, model))
        """,
        """
        model_of = load_model
        def load_model(model_file_path):
            return model_of(model_file_path)
        """,
        """
        scene_of = get_scene_embeddings
        def get_scene_embeddings(audio, model):  # does not mind how loud it is
            peak = audio.abs().amax(1, keepdim=True)
            return scene_of(audio / peak * peak, model)
        """,
        """
        import tensorflow
        class Tensor:
            def __init__(self, values):
                self.values = values
            def __array__(self, dtype=None, copy=None):
                return self.values
        class TensorflowModel:
            def __init__(self, model):
                self.model = model
                self.sample_rate, self.scene_embedding_size, self.timestamp_embedding_size = 8_000, 6, 6
        tensorflow.Module, tensorflow.convert_to_tensor = TensorflowModel, Tensor
        torch_model, torch_frames = load_model, get_timestamp_embeddings
        def load_model(path=""):
            return TensorflowModel(torch_model(path))
        def get_timestamp_embeddings(audio, model):
            with torch.no_grad():
                found = torch_frames(torch.from_numpy(audio.values), model.model)
            return tuple(Tensor(part.numpy()) for part in found)
        def get_scene_embeddings(audio, model):
            return Tensor(get_timestamp_embeddings(audio, model)[0].values.mean(1))
        """,
    ],
    ids=["numpy", "path without default", "divides by the peak", "TensorFlow"],
)
def test_modules_of_other_habits(module, monkeypatch, more):
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    wave = noise(20_000)
    want = load_encoder(f"hear:{module('plain_hear')}", "cpu")
    encoder = load_encoder(f"hear:{module('fake_hear', more)}", "cpu")
    assert (encoder.embedding_dim, encoder.min_samples, encoder.frame_samples) == (6, 400, 400)
    for pool in ("mean", "none"):
        expected = want.embed(wave, 8_000, pool=pool).values
        torch.testing.assert_close(encoder.embed(wave, 8_000, pool=pool).values, expected, rtol=0, atol=1e-6)


def test_scenes_do_without_timestamps_that_fail(module):
    once_only = """
        frames_of = get_timestamp_embeddings
        def get_scene_embeddings(audio, model):
            model.hop = None
            return model(audio).mean(1)
        def get_timestamp_embeddings(audio, model):
            return frames_of(audio, model)[0], model.hop * 2
    """
    encoder = load_encoder(f"hear:{module('fake_hear', once_only)}", "cpu")
    assert encoder.embed(noise(8_000), 8_000).values.shape == (1, 6)
    assert encoder.frame_samples is None


def test_weights_are_handed_over_and_decide_the_id(module, tmp_path):
    name = module("fake_hear")
    plain = load_encoder(f"hear:{name}", "cpu")
    weights = {key: 2 * value for key, value in plain.model.state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    other = load_encoder(f"hear:{name}:{tmp_path / 'w.pt'}", "cpu")
    assert other.id != plain.id
    assert load_encoder(f"hear:{name}", "cpu").id == plain.id
    wave = noise(8_000)
    torch.testing.assert_close(other.embed(wave, 8_000).values, 2 * plain.embed(wave, 8_000).values, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"hear:fake_hear:no\.pt: load_model failed: FileNotFoundError"):
        load_encoder(f"hear:{name}:no.pt", "cpu")


def test_a_folder_of_weights_and_a_module_that_is_being_written_decide_the_id(module, tmp_path, monkeypatch):
    """As a SavedModel of TensorFlow, whose numbers torch does not know; and a package installed in place."""
    unknown = """
        import pathlib
        torch_model, torch_scene = load_model, get_scene_embeddings
        class Plain:
            sample_rate, scene_embedding_size, timestamp_embedding_size = 8_000, 6, 1
        def load_model(folder):
            model = Plain()
            model.gain = float((pathlib.Path(folder) / "variables" / "gain").read_text())
            return model
        def get_scene_embeddings(audio, model):
            return torch_scene(audio, torch_model()) * model.gain
    """
    name = module("fake_hear", unknown)
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: {name: ["torch"]})  # it has a version
    inside = tmp_path / "saved" / "variables"
    inside.mkdir(parents=True)
    ids = []
    for gain, more in (("1", ""), ("2", ""), ("2", "\n# another way")):
        (inside / "gain").write_text(gain)
        (tmp_path / f"{name}.py").write_text((tmp_path / f"{name}.py").read_text() + more)
        ids += [load_encoder(f"hear:{name}:{tmp_path / 'saved'}", "cpu").id for _ in range(2)]
    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == 3


def test_no_frames_where_timestamps_have_another_size_no_distance_or_no_milliseconds(module):
    bigger = "Model.timestamp_embedding_size = 12"
    uneven = """
        def get_timestamp_embeddings(audio, model):
            found = model(audio)
            return found, (torch.arange(found.shape[1]) ** 2.0).expand(len(audio), -1)
    """
    seconds = """
        Model.sample_rate = 16_000
        in_ms = get_timestamp_embeddings
        def get_timestamp_embeddings(audio, model):
            found, times = in_ms(audio, model)
            return found, times / 1000
    """
    for i, more in enumerate((bigger, uneven, seconds)):
        encoder = load_encoder(f"hear:{module(f'fake_hear_{i}', more)}", "cpu")
        assert encoder.frame_samples is None
        assert encoder.embed(noise(8_000), 8_000).values.shape == (1, 6)
        with pytest.raises(ConfigError, match="has no frame embeddings"):
            encoder.embed(noise(8_000), 8_000, pool="none")


def test_scenes_cost_no_timestamps_and_frames_one_pass_a_length(module):
    counting = """
        asked = []
        given = get_timestamp_embeddings
        def get_timestamp_embeddings(audio, model):
            asked.append(tuple(audio.shape))
            return given(audio, model)
    """
    name = module("fake_hear", counting)
    encoder = load_encoder(f"hear:{name}", "cpu")
    asked = sys.modules[name].asked
    asked.clear()
    encoder.embed([noise(n) for n in (700, 4_000, 4_100, 4_000)], 8_000)
    assert asked == []
    encoder.embed([noise(n) for n in (4_000, 4_100, 4_000)], 8_000, pool="none")
    assert sorted(asked) == [(1, 4_000), (1, 4_100), (1, 4_100), (2, 4_000)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_are_whole_and_what_is_dropped_is_gone(module, copied):
    encoder = load_encoder(f"hear:{module('fake_hear')}", "cpu")
    want, known = encoder.embed(noise(8_000), 8_000, pool="none"), encoder.id
    other, gone = copied(encoder), weakref.ref(encoder)
    gc.disable()
    try:
        del encoder
        assert gone() is None  # without the collector of cycles
    finally:
        gc.enable()
    assert other.id == known
    assert torch.equal(other.embed(noise(8_000), 8_000, pool="none").values, want.values)


def test_frames_must_depend_on_the_length_alone(module):
    fickle = """
        def get_timestamp_embeddings(audio, model):
            found = model(audio)[:, 1 if audio.any() else 0 :]
            return found, (50.0 * torch.arange(found.shape[1])).expand(len(audio), -1)
    """
    encoder = load_encoder(f"hear:{module('fake_hear', fickle)}", "cpu")
    with pytest.raises(CheckpointError, match="19 timestamps for 8000 samples, and 20 for as much silence"):
        encoder.embed(noise(8_000), 8_000, pool="none")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("del get_scene_embeddings", "has no get_scene_embeddings, so it does not speak the HEAR API"),
        ("Model.sample_rate = '8k'", "the model has no whole number sample_rate"),
        ("Model.scene_embedding_size = 7", "2 s of noise: CheckpointError: .* gave .*; expected a tensor"),
        ("def get_scene_embeddings(a, m): return m(a).mean(1) / 0", "2 s of noise: NaN or infinite numbers"),
        ("raise RuntimeError('no licence')", r"cannot be imported \(RuntimeError: no licence\)"),
        ("def load_model(): raise OSError('no weights')", "load_model failed: OSError: no weights"),
        ("raise SystemExit(2)", r"cannot be imported \(SystemExit: 2\)"),
        ("def load_model(): raise SystemExit('no weights')", "load_model failed: SystemExit: no weights"),
        ("def get_scene_embeddings(a, m): raise SystemExit(1)", "2 s of noise: SystemExit: 1"),
    ],
)
def test_faults_are_told(module, more, line):
    with pytest.raises(CheckpointError, match=line):
        load_encoder(f"hear:{module('fake_hear', more)}", "cpu")


def test_what_cannot_be(module):
    with pytest.raises(ConfigError, match="expected hear:MODULE or hear:MODULE:WEIGHTS"):
        load_encoder("hear", "cpu")
    with pytest.raises(CheckpointError, match=r"hear:no_such_module: the module cannot be imported .*; install"):
        load_encoder("hear:no_such_module", "cpu")
    with pytest.raises(ConfigError, match=r"hear:fake_hear: .* got torch\.bfloat16, expected float32"):
        load_encoder(f"hear:{module('fake_hear')}", "cpu", dtype="bfloat16")


def test_this_package_speaks_it_too():
    assert load_encoder("hear:matpac_fast.hear", "cpu").embedding_dim == load_encoder(device="cpu").embedding_dim
    ours = load_encoder("hear:matpac_fast.hear:untrained-tiny", "cpu")
    tiny = load_encoder("untrained-tiny", "cpu")
    wave = noise(20_000)
    torch.testing.assert_close(ours.embed(wave, 16_000).values, tiny.embed(wave, 16_000).values, rtol=0, atol=1e-5)
    assert ours.frame_samples == tiny.frame_samples // 4
    again = hear.get_timestamp_embeddings(wave[None], hear.HearModel(ours))[1]
    torch.testing.assert_close(again, hear.get_timestamp_embeddings(wave[None], hear.HearModel(tiny))[1])
