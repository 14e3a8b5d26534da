"""A model of another front end than MATPAC's: trained, gone on with, embedded, exported, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_run
from safetensors.torch import load_file
from stops import after

from matpac_fast import checkpoint, ops
from matpac_fast.config import FRONT_END, MatpacConfig
from matpac_fast.encoder import load_encoder
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.export import Exportable
from matpac_fast.model import Matpac
from matpac_fast.reference import LogMelConfig, log_mel
from matpac_fast.train.begin import check_options
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.estimate import estimate
from matpac_fast.train.logs import read_log
from matpac_fast.train.loop import pretrain
from matpac_fast.train.sampler import Sampler
from matpac_fast.train.weights import weights_sizes
from matpac_fast.vit_encoder import Encoder, sizes_of

OTHER = dict(sample_rate=32_000, n_fft=1024, win_length=800, hop=320, n_mels=64, f_min=20, f_max=16_000.0, bank="htk")
OTHER |= dict(mean=-5.0, std=3.0)
CPU = torch.device("cpu")


@pytest.fixture
def corpus(memory_corpus):
    corpus = memory_corpus([12_000] * 6)
    corpus.sample_rate = 32_000
    return corpus


@pytest.fixture
def config():
    return MatpacConfig.preset("nano", n_frames=32, **OTHER)


def test_it_is_trained_gone_on_with_embedded_and_exported(tmp_path, corpus, config):
    train = TrainConfig(steps=2, batch_size=3, log_every=1, precision="float32")
    pretrain(corpus, tmp_path / "a", config, train, stop=after(1))
    assert pretrain(corpus, tmp_path / "a", config, train).finished
    pretrain(corpus, tmp_path / "b", config, train)
    assert_same_run(tmp_path / "a", tmp_path / "b")

    mel = LogMelConfig(**OTHER)
    plan = Sampler(corpus.frames, [1024 + 31 * 320], 3, train.seed).plan(0)
    spec = log_mel(torch.from_numpy(corpus.gather(plan.clips, plan.starts, plan.crop)), mel)
    order = ops.mask_shuffle(train.seed, 0, torch.from_numpy(plan.index), 4 * 2)
    loss = next(r["loss"] for r in read_log(tmp_path / "b" / "log.jsonl") if "loss" in r)
    assert loss == pytest.approx(Matpac(config)(spec, order).loss.item(), rel=1e-5)

    encoder = load_encoder(tmp_path / "a", "cpu")
    assert isinstance(encoder, Encoder)
    assert (encoder.sample_rate, encoder.native_seconds, encoder.facts()["frame_seconds"]) == (32_000, 0.32, 0.16)
    wave = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)) / 10
    model = Matpac.load(tmp_path / "a")
    assert model.config == config
    spec = log_mel(wave, mel)
    tokens = model.student(model.frontend(F.pad(spec, (0, -spec.shape[-1] % 16))))[:, 1:]
    want = tokens.unflatten(1, (4, -1)).transpose(1, 2).flatten(2).mean(1)
    torch.testing.assert_close(encoder.embed(wave, 32_000).values[:, 0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(Exportable(encoder)(wave), want, rtol=0, atol=1e-4)
    encoder.save(tmp_path / "encoder")
    assert load_encoder(tmp_path / "encoder", "cpu").id == encoder.id


def test_what_was_written_before_it_could_be_said_is_matpacs(tmp_path, memory_corpus, model_config, train_config):
    corpus = memory_corpus([8_000] * 6)
    pretrain(corpus, tmp_path / "a", model_config, train_config)
    pretrain(corpus, tmp_path / "b", model_config, train_config, stop=after(4))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    older = {name: value for name, value in config["model"].items() if name == "n_mels" or name not in FRONT_END}
    assert len(older) == len(config["model"]) - 15
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"model": older}))
    file = tmp_path / "b" / "checkpoints" / "step-00000004" / "model.safetensors"
    checkpoint.save(file, load_file(file), {"kind": "matpac", "config": older, "step": 4})
    state = file.with_name("state.json")
    state.write_text(
        json.dumps({name: value for name, value in json.loads(state.read_text()).items() if name != "crc32"})
    )
    assert Matpac.load(tmp_path / "b").config == model_config
    load_encoder(tmp_path / "b", "cpu")
    pretrain(corpus, tmp_path / "c", model_config, train_config, init=tmp_path / "b", stop=after(1))
    assert pretrain(corpus, tmp_path / "b", model_config, train_config).finished
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_init_across_front_ends_is_refused(tmp_path, corpus, memory_corpus, config):
    train = TrainConfig(steps=2, batch_size=3)
    Matpac(config).save(tmp_path / "other")
    assert MatpacConfig(**weights_sizes(tmp_path / "other"), n_frames=32) == config
    told = "another model: sample_rate is 32000 there and 16000 here, n_fft is 1024 there and 400 here, .*std is 3.0"
    plain = MatpacConfig.preset("nano", n_frames=32, n_mels=64)
    with pytest.raises(CheckpointError, match=told):
        pretrain(memory_corpus([8_000] * 6), tmp_path / "run", plain, train, init=tmp_path / "other")
    torch.save({"model": Matpac(config.replace(n_mels=80)).official_state_dict()}, tmp_path / "official.pt")
    with pytest.raises(CheckpointError, match="sample_rate is 16000 there and 32000 here"):
        pretrain(corpus, tmp_path / "run", config.replace(n_mels=80), train, init=tmp_path / "official.pt")


def test_the_corpus_has_the_models_rate(corpus, memory_corpus, config):
    train = TrainConfig(steps=2, batch_size=3, precision="float32")
    assert check_options(corpus, config, train, CPU, 1) == [1024 + 31 * 320]
    assert "6, 0 shorter than a crop" in estimate(corpus, config, train, CPU)
    with pytest.raises(ConfigError, match="16000 Hz; expected 32000 Hz, .* it with --sample-rate 32000, or .* 16000"):
        check_options(memory_corpus([8_000] * 6), config, train, CPU, 1)


def test_the_encoder_is_told_what_is_not_matpacs_alone(config):
    assert sizes_of(MatpacConfig()).keys() == {*Encoder(depth=1).sizes}  # an older encoder's id stays
    assert sizes_of(config).items() >= OTHER.items()
    assert MatpacConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.log_mel == LogMelConfig(**OTHER)
    assert MatpacConfig().log_mel == LogMelConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(f_max=9_000.0), "f_max 9000 Hz; expected 0 <= f_min < f_max <= 8000, half the sample rate"),
        (dict(bank=["htk"]), r"bank is \['htk'\]; expected one of slaney, htk, kaldi"),
        (dict(hop="160"), "hop is '160'; expected a whole number"),
        (dict(n_fft=256), "expected 1 <= win_length <= n_fft"),
        (dict(std=float("nan")), "std is nan; expected a finite number"),
        (dict(f_max=float("inf")), "f_max is inf; expected a finite number"),
        (dict(log_offset=-1e-7), "log_offset is -1e-07; expected 0 or more"),
    ],
)
def test_front_ends_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        MatpacConfig(**fields)


def test_other_fields_differ_in_the_refusal_of_a_run(tmp_path, corpus, config):
    train = TrainConfig(steps=1, batch_size=3, precision="float32")
    pretrain(corpus, tmp_path, config, train)
    with pytest.raises(ConfigError, match=r"model\.mean is -5\.0 there and -4\.5 here"):
        pretrain(corpus, tmp_path, dataclasses.replace(config, mean=-4.5), train)
