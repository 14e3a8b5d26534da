"""The HEAR 2021 API: the checks of hearvalidator 2021.0.6 reproduced, values, and 20 minutes in bounded memory."""

from __future__ import annotations

import pytest
import torch

from matpac_fast import hear
from matpac_fast.errors import AudioError, CheckpointError, ConfigError
from matpac_fast.vit_encoder import Encoder
from matpac_fast.zoo.crepe import Crepe

SECOND = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> hear.HearModel:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hear") / "encoder.safetensors"
    Encoder(n_frames=64, width=32, depth=1, num_heads=2).save(path)
    return hear.load_model(str(path)).to("cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_model_says_its_rate_and_sizes(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16_000, 22_050, 44_100, 48_000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int


@pytest.mark.parametrize("seconds", [1.07, 1.98, 2.0, 4.0])
def test_timestamp_embeddings_as_the_validator_wants_them(model, seconds):
    audio = noise(3, int(seconds * model.sample_rate))
    before = audio.clone()
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    count = int(seconds * 25) + 1
    assert embeddings.shape == (3, count, model.timestamp_embedding_size)
    assert timestamps.shape == (3, count)
    steps = timestamps.diff(dim=1)
    assert steps.max() <= 50.0
    assert ((steps - steps.mean()).abs() < 1e-3).all()
    assert (steps > 0).all()
    assert timestamps.min() == 0.0
    assert 1000 * seconds - 40.0 < timestamps.max() <= 1000 * seconds
    assert torch.equal(audio, before)


def test_scene_embeddings_as_the_validator_wants_them(model):
    audio = noise(8, int(3.74 * model.sample_rate))
    embeddings = hear.get_scene_embeddings(audio, model)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (8, model.scene_embedding_size)
    want = model.encoder.embed(audio, SECOND).values[:, 0]
    assert torch.equal(embeddings, want)


def test_each_timestamp_has_the_frame_that_stands_there(model):
    audio = noise(2, 9_876)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    silence = torch.zeros(2, 1_280)
    for i in range(embeddings.shape[1]):
        start = 640 * (i % 4)  # samples that the pass begins later than the first, whose first frame is half silence
        frames = model.encoder.embed(torch.cat([silence, audio], dim=1)[:, start:], SECOND, pool="none")
        torch.testing.assert_close(embeddings[:, i], frames.values[:, i // 4], rtol=0, atol=1e-5)
        begin = (start - 1_280) / SECOND + float(frames.start[i // 4])
        assert float(timestamps[0, i]) == pytest.approx(1000 * (begin + 0.08), abs=1e-3)
    assert embeddings.shape[1] == 1 + 9_876 // 640


@pytest.mark.parametrize("passes", [1, 3, 7])
def test_any_number_of_passes_says_the_time_of_each_frame(model, monkeypatch, passes):
    monkeypatch.setattr(model, "passes", passes)
    audio = noise(1, 30_000)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert (timestamps.diff() > 0).all()
    shifts = {1: [0], 3: [-854, 0, 853], 7: [-1098, -732, -366, 0, 365, 731, 1097]}[passes]
    for i in (0, passes - 1, passes, 10 * passes - 1):
        shift = shifts[i % passes]
        whole = torch.nn.functional.pad(audio, (max(0, -shift), 0))[:, max(0, shift) :]
        frames = model.encoder.embed(whole, SECOND, pool="none").values[0]
        torch.testing.assert_close(embeddings[0, i], frames[i // passes], rtol=0, atol=1e-5)
        assert float(timestamps[0, i]) == pytest.approx(80 + 160 * (i // passes) + shift / 16, abs=1e-3)
    assert float(timestamps[0, -1]) <= 30_000 / 16


@pytest.mark.parametrize("passes", [0, -1, 2561, 2.0])
def test_passes_that_cannot_be_say_so(model, monkeypatch, passes):
    monkeypatch.setattr(model, "passes", passes)
    with pytest.raises(ConfigError, match=f"model.passes is {passes}; expected a whole number, 1 to 2560"):
        hear.get_timestamp_embeddings(noise(1, 8_000), model)


@pytest.mark.parametrize("n", [1, 400, 640, 1_039, 1_040, 2_560, 2_700])
def test_short_sounds_have_regular_timestamps(model, n):
    embeddings, timestamps = hear.get_timestamp_embeddings(noise(3, n), model)
    assert embeddings.shape[:2] == timestamps.shape == (3, 1 + n // 640)
    torch.testing.assert_close(timestamps[0], 40.0 * torch.arange(timestamps.shape[1]))
    assert torch.isfinite(embeddings).all()


def test_one_pass_over_a_short_sound_gives_the_frame_there_is(model, monkeypatch):
    monkeypatch.setattr(model, "passes", 1)
    for n, times in ((1, [80.0]), (1_000, [80.0]), (3_839, [80.0]), (3_840, [80.0, 240.0])):
        embeddings, timestamps = hear.get_timestamp_embeddings(noise(1, n), model)
        assert timestamps[0].tolist() == times
        assert embeddings.shape[1] == len(times)


def test_twenty_minutes_go_through_in_small_batches(model, monkeypatch):
    batches = []
    forward = Encoder.forward_groups

    def counted(self: Encoder, groups: list[torch.Tensor], *options: str) -> list[torch.Tensor]:
        batches.append(sum(map(len, groups)))
        return forward(self, groups, *options)

    monkeypatch.setattr(Encoder, "forward_groups", counted)
    audio = noise(1, 1200 * SECOND)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (1, 30_001, model.timestamp_embedding_size)
    assert (timestamps.diff() > 0).all()
    assert float(timestamps[0, -1]) == pytest.approx(1_200_000, abs=60)
    assert hear.get_scene_embeddings(audio, model).shape == (1, model.scene_embedding_size)
    assert max(batches) <= 16


def test_sixteen_bits_and_arrays_are_the_same_sounds(model):
    audio = (noise(2, 8_000) * 20).short()  # as quiet as some recordings end
    want = hear.get_scene_embeddings(audio / 32_768, model)
    frames = hear.get_timestamp_embeddings(audio / 32_768, model)[0]
    assert frames.shape == (2, 13, model.timestamp_embedding_size)
    for sounds in (audio, audio.numpy(), (audio / 32_768).double().numpy()):
        assert torch.equal(hear.get_scene_embeddings(sounds, model), want)
        assert torch.equal(hear.get_timestamp_embeddings(sounds, model)[0], frames)


@pytest.mark.parametrize("set_default", [torch.set_default_dtype, torch.set_default_device])
def test_an_application_s_defaults_change_nothing(model, set_default):
    audio = noise(2, SECOND)
    want = hear.get_timestamp_embeddings(audio, model)
    set_default(torch.float16 if set_default is torch.set_default_dtype else "meta")
    try:
        found = hear.get_timestamp_embeddings(audio, model)
    finally:
        set_default(torch.float32 if set_default is torch.set_default_dtype else None)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_frames_that_are_centred_are_told_at_their_middle():
    times = hear.get_timestamp_embeddings(noise(1, 4_000), hear.HearModel(Crepe("tiny").eval()))[1]
    assert times[0].tolist() == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]


def test_what_is_no_hear_call_says_so(model):
    with pytest.raises(ConfigError, match="logmel-stats has no frame embeddings"):
        hear.get_timestamp_embeddings(noise(1, 8_000), hear.load_model("logmel-stats").to("cpu"))
    with pytest.raises(CheckpointError, match="no encoder 'nowhere'"):
        hear.load_model("nowhere")
    for function in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(AudioError, match=r"audio is \(800,\); expected \(sounds, samples\)"):
            function(torch.zeros(800), model)
        with pytest.raises(AudioError, match=r"audio is a list; expected \(sounds, samples\)"):
            function([0.0] * 800, model)
        with pytest.raises(AudioError, match=r"audio is \(2, 0\): no audio"):
            function(torch.zeros(2, 0), model)
