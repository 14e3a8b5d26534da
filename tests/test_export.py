"""Export: one ONNX or torch.export file from waves to embeddings, at any batch and length."""

from __future__ import annotations

import json
import resource
import sys
import types

import numpy as np
import pytest
import torch

from matpac_fast import cli, export, load_encoder
from matpac_fast.errors import ConfigError
from matpac_fast.vit_encoder import Encoder

SECOND = 16_000
SHAPES = [(1, 400), (2, 559), (1, 3_000), (3, 10_399), (1, 10_640), (2, 10_641), (1, 33_333)]


def make(framing: str = "valid") -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=32, depth=1, num_heads=2, framing=framing)


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32) / 10)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make()


@pytest.mark.parametrize("framing", ["valid", "center"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_is_the_encoder(shape, framing):
    encoder = make(framing)
    waves = noise(*shape)
    got = export.Exportable(encoder)(waves)
    torch.testing.assert_close(got, encoder.embed(waves, SECOND).values[:, 0], rtol=0, atol=1e-5)


def test_the_applications_default_device_changes_nothing(encoder):
    waves = noise(2, 10_641)
    with torch.device("meta"):  # as torch.set_default_device("cuda") with the encoder on the CPU
        got = export.Exportable(encoder)(waves)
    torch.testing.assert_close(got, encoder.embed(waves, SECOND).values[:, 0], rtol=0, atol=1e-5)


def test_log_mel_as_matrix_products(encoder):
    graph = export.Exportable(encoder)
    silence, full, quiet = torch.zeros(1, 4_000), noise(1, 4_000).sign(), noise(1, 4_000) * 1e-4
    for waves in (silence, full, quiet, noise(2, 12_345)):
        want = encoder.log_mel(waves.double()).transpose(1, 2)
        error = (graph.log_mel(waves) - want).abs().max()
        own = (encoder.log_mel(waves).transpose(1, 2) - want).abs().max()
        assert error <= 2 * own + 1e-5


@pytest.fixture(scope="module")
def program(encoder) -> torch.export.ExportedProgram:
    return export.to_program(encoder)


@pytest.fixture
def traced(program, monkeypatch) -> None:
    """Tracing takes seconds, so it is done once for all."""
    monkeypatch.setattr(export, "to_program", lambda _: program)


@pytest.mark.usefixtures("traced")
@pytest.mark.skipif(not export.can_onnx(), reason="ONNX export needs torch 2.8 or later")
def test_onnx_runs_at_every_batch_and_length(encoder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export.export_onnx(encoder, tmp_path / "encoder.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["waves"]
    assert session.get_inputs()[0].shape == ["batch", "samples"]
    assert session.get_outputs()[0].shape == ["batch", 160]
    assert "of 400 samples (25 ms) or more" in session.get_modelmeta().description
    about = json.loads(session.get_modelmeta().custom_metadata_map["matpac_fast"])
    assert (about["sample_rate"], about["id"]) == (SECOND, encoder.id)
    for shape in SHAPES:
        waves = noise(*shape)
        (got,) = session.run(None, {"waves": waves.numpy()})
        want = encoder.embed(waves, SECOND).values[:, 0]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize("front_end", [{"framing": "kaldi"}, {"preemphasis": 0.97}, {"log_floor": 1e-5}])
def test_a_front_end_that_the_graph_has_not_is_refused(front_end):
    encoder = Encoder(n_frames=64, width=16, depth=1, num_heads=2, **front_end)
    with pytest.raises(ConfigError, match="has Kaldi's framing, pre-emphasis or a floor; expected none"):
        export.Exportable(encoder)


def test_a_gain_is_in_the_graph():
    encoder = Encoder(n_frames=64, width=16, depth=1, num_heads=2, gain=100.0)
    waves = noise(2, 8_000)
    want = encoder.embed(waves, SECOND).values[:, 0]
    torch.testing.assert_close(export.Exportable(encoder)(waves), want, rtol=0, atol=1e-5)


def test_the_heads_that_are_given_are_the_encoders(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("matpac_fast.encoder.load_encoder", lambda *args: asked.append(args))
    args = ["export", "--encoder", "e.pt", "--num-heads", "6", "--torch", str(tmp_path / "e.pt2")]
    assert cli.main(args) == cli.FAILED
    assert asked == [("e.pt", "cpu", 6)]
    assert capsys.readouterr().err.endswith("only MATPAC and M2D encoders can be exported\n")


@pytest.mark.usefixtures("traced")
def test_torch_export_runs_at_every_batch_and_length(encoder, tmp_path, capsys):
    encoder.save(tmp_path / "e.safetensors")
    args = ["export", "--encoder", str(tmp_path / "e.safetensors"), "--num-heads", "2"]
    assert cli.main([*args, "--torch", str(tmp_path / "encoder.pt2")]) == 0
    said = capsys.readouterr().out
    assert "MiB; off from PyTorch by at most" in said
    assert "float32 mono at 16000 Hz, of 400 samples (25 ms) or more; pad a shorter one" in said
    program = torch.export.load(str(tmp_path / "encoder.pt2")).module()
    for shape in SHAPES:
        waves = noise(*shape)
        want = encoder.embed(waves, SECOND).values[:, 0]
        torch.testing.assert_close(program(waves), want, rtol=0, atol=1e-5)


def test_a_graph_that_is_off_is_not_written(encoder, tmp_path, monkeypatch):
    assert export.check(encoder, export.Exportable(encoder)) < 1e-5
    wrong = export.Exportable(encoder)
    wrong.bank *= 1.01
    with pytest.raises(ConfigError, match="the exported graph is off by"):
        export.check(encoder, wrong)
    monkeypatch.setattr(export, "to_program", lambda _: None)
    monkeypatch.setattr(torch.export, "save", lambda program, file, extra_files: file.write(b"program"))
    monkeypatch.setattr(torch.export, "load", lambda file: types.SimpleNamespace(module=lambda: wrong))
    with pytest.raises(ConfigError, match="the exported graph is off by"):
        export.export_torch(encoder, tmp_path / "wrong.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_or_an_encoder_that_gives_no_numbers_is_not_written(encoder):
    spoilt = export.Exportable(encoder)
    spoilt.bank *= float("nan")
    with pytest.raises(ConfigError, match="the exported graph is off by nan"):
        export.check(encoder, spoilt)
    diverged = make()
    diverged.student.norm.weight.fill_(float("inf"))
    with pytest.raises(ConfigError, match="the encoder's own embeddings of noise are not finite, so its weights are"):
        export.check(diverged, export.Exportable(diverged))


@pytest.mark.usefixtures("traced")
def test_a_full_disk_is_one_error_that_names_the_file(encoder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError, match=r"File too large: .*/e\.pt2'$"):
            export.export_torch(encoder, tmp_path / "e.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_a_place_that_cannot_be_written_is_named_as_it_was_given(encoder, tmp_path):
    long = tmp_path / ("e" * 250)  # the name of the file beside it is longer
    (tmp_path / "e.pt2").mkdir()
    for path, says in ((tmp_path / "e.pt2", "directory"), (long, "name too long")):
        with pytest.raises(OSError, match=says) as caught:
            export.export_torch(encoder, path)
        assert caught.value.filename == str(path)


def test_what_cannot_be_exported_says_so(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs onnx: pip install 'matpac_fast\[export\]'"):
        export.export_onnx(encoder, tmp_path / "x.onnx")
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(ConfigError, match=r"needs torch 2\.8 or later; this is 2\.7\.1\+cu126: --torch does without"):
        export.export_onnx(encoder, tmp_path / "x.onnx")
    with pytest.raises(ConfigError, match=r"the encoder is in torch\.bfloat16; load it in float32"):
        export.Exportable(make().prepare(torch.bfloat16))
    for cast, dtype in (("half", "float16"), ("double", "float64")):
        with pytest.raises(ConfigError, match=rf"the encoder is in torch\.{dtype}; load it in float32"):
            export.Exportable(getattr(make(), cast)())
    with pytest.raises(ConfigError, match="logmel-stats is a LogMelStatistics; expected a MATPAC or M2D encoder"):
        export.to_program(load_encoder("logmel-stats", "cpu"))
    assert cli.main(["export", "--encoder", "untrained-tiny"]) == cli.FAILED
    assert "nothing to export: give --onnx FILE, --torch FILE or both" in capsys.readouterr().err
