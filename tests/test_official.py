"""get_matpac's model and its input: what it takes, what it refuses, and whose autocast it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import matpac_fast as mf
from matpac_fast.errors import AudioError, CheckpointError, ConfigError
from matpac_fast.official import OfficialMatpac, get_matpac


@pytest.fixture(scope="module")
def model() -> OfficialMatpac:
    return get_matpac("untrained-nano", device="cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32) / 10)


def test_a_probe_of_few_classes_and_what_it_sets(tmp_path):
    path = tmp_path / "probe.pt"
    torch.save({"w": noise(3, 960), "b": torch.tensor([20.0, 10.0, 0.0])}, path)
    options = dict(probe_checkpoint_paths=path, multi_label=False, device="cpu")
    probed = get_matpac("untrained-nano", "fast", False, False, **options)
    assert (probed.inference_type, probed.pull_time_dimension, probed.concat_freq) == ("precise", True, True)
    probs, labels = probed.probe_forward(noise(2, 9_000))
    assert [len(row) for row in labels] == [3, 3]  # all there are
    torch.testing.assert_close(probs.sum(1), torch.ones(2))
    with pytest.raises(ConfigError, match="2 class names for 3 classes"):
        get_matpac("untrained-nano", class_names=["a", "b"], **options)
    for names in (["dog", "cat", "owl"], {"owl": 2, "dog": 0, "cat": 1}):
        _, labels = get_matpac("untrained-nano", class_names=names, **options).probe_forward(torch.zeros(1, 9_000))
        assert [label.split()[0] for label in labels[0]] == ["dog", "cat", "owl"]  # in the order of their bias
    with pytest.raises(ConfigError, match="3 class names for 3 classes; expected .* each one's place from 0 on"):
        get_matpac("untrained-nano", class_names={"dog": 1, "cat": 2, "owl": 3}, **options)
    torch.save({"w": noise(3, 480), "b": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="a probe of 480 inputs, on an encoder of 960"):
        get_matpac("untrained-nano", **options)
    torch.save({"w": noise(3, 960), "b": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match=r"expected one linear layer's weight and bias, found w \(3, 960\)"):
        get_matpac("untrained-nano", **options)


def test_an_inference_type_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="inference_type is 'exact'; expected 'precise' or 'fast'"):
        get_matpac("untrained-nano", "exact", device="cpu")


def test_encoders_that_it_or_the_head_is_not_of_are_refused():
    with pytest.raises(ConfigError, match="logmel-stats is a LogMelStatistics; expected a MATPAC encoder"):
        get_matpac("logmel-stats", device="cpu")
    with pytest.raises(
        ConfigError, match="AudioSet head is of the last layer, and this is untrained-nano@layer2; leave it out"
    ):
        get_matpac("untrained-nano@layer2", as_class_head=True, device="cpu")


@pytest.mark.parametrize("as_given", [lambda w: w.double(), lambda w: w.numpy(), lambda w: w.double().numpy()[:, None]])
def test_any_float_and_arrays_give_the_same(model, as_given):
    wave = noise(2, 9_000)
    for got, want in zip(model(as_given(wave)), model(wave), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("a.wav", "x is a str; expected a tensor or array"),
        ([0.1, 0.2], "x is a list; expected a tensor or array"),
        (torch.zeros(4_000, 2), r"x is \(4000, 2\), which looks like samples by channels"),
        (torch.zeros(3, 2, 4_000), r"x is \(3, 2, 4000\); expected .* mono"),
        (torch.full((800,), float("nan")), "x holds NaN"),
        (torch.zeros(2, 0), r"x is \(2, 0\): no audio"),
        (torch.zeros(800, dtype=torch.int64), "x is torch.int64; expected float or int16"),
    ],
)
def test_what_is_no_mono_audio_is_named(model, x, message):
    with pytest.raises(AudioError, match=message):
        model(x)


def test_a_probe_inside_something_else_is_named(tmp_path):
    layer = {"weight": torch.ones(10, 960), "bias": torch.zeros(10)}
    torch.save({"state_dict": layer}, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="one linear layer's weight and bias, found state_dict dict"):
        get_matpac("untrained-nano", probe_checkpoint_paths=tmp_path / "whole.pth", device="cpu")


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16"])
def test_casts_of_the_model_compute(tmp_path, cast):
    torch.save({"weight": torch.ones(10, 960) / 960, "bias": torch.zeros(10)}, tmp_path / "probe.pth")
    model = get_matpac("untrained-nano", probe_checkpoint_paths=tmp_path / "probe.pth", device="cpu")
    wave = noise(4_000)
    want, wanted = model(wave)[0], model.probe_forward(wave)[0]
    dtype = getattr(torch, cast)
    got, probabilities = getattr(model, cast)()(wave)[0], model.probe_forward(wave)[0]
    assert got.dtype == probabilities.dtype == dtype
    off = {torch.double: 1e-5, torch.half: 0.02, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=off)
    torch.testing.assert_close(probabilities, wanted.to(dtype), rtol=0, atol=off)


def test_the_gradient_of_a_wave_passes_the_check(model):
    wave = noise(4_000).double().requires_grad_()
    model(wave)[0].sum().backward()
    assert wave.grad is not None
    assert wave.grad.dtype == torch.float64
    assert wave.grad.abs().max() > 0


def test_torch_func_and_forward_mode_see_the_wave_and_the_weights(model):
    wave, along = noise(2, 4_000), noise(2, 4_001)[:, 1:]

    def emb(x):
        return model(x)[0]

    asked = wave.clone().requires_grad_()
    emb(asked).square().sum().backward()
    assert asked.grad is not None
    want = (asked.grad * along).sum()
    torch.testing.assert_close(torch.func.grad(lambda x: emb(x).square().sum())(wave), asked.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.func.vmap(emb)(wave).squeeze(1), emb(wave), rtol=1e-4, atol=1e-5)
    by_func = torch.func.jvp(lambda x: emb(x).square().sum(), (wave,), (along,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(emb(forward_ad.make_dual(wave, along)).square().sum())
    assert dual.tangent is not None
    torch.testing.assert_close(by_func, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dual.tangent, want, rtol=1e-3, atol=1e-3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda w: torch.func.functional_call(model, w, (wave,))[0].square().sum())(weights)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().max() > 0 for grad in grads.values())


def test_the_callers_autocast_does_not_round_the_log_mel(model):
    wave = noise(9_000)
    with mf.use_backend("reference"):
        want = model._spec(wave)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model._spec(wave), want)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 does not say that it exports")
@pytest.mark.parametrize("kind", ["precise", "fast"])
@pytest.mark.parametrize("strict", [False, True])
def test_it_is_exported(kind, strict):
    """Of the shape that is given; what an export traces has no samples to be checked."""
    model, wave = get_matpac("untrained-nano", kind, device="cpu"), noise(2, 9_000)
    exported = torch.export.export(model, (wave,), strict=strict).module()
    other = noise(2, 9_000).flip(1)
    for got, want in zip(exported(other), model(other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compiled_it_still_checks_its_samples(model):
    with pytest.raises(AudioError, match="x holds NaN or infinite samples"):
        torch.compile(model, backend="eager")(torch.full((9_000,), torch.nan))
