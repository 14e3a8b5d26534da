"""Matpac against the official code's own outputs, and the savings against the plain way of computing them."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from matpac_fast import checkpoint
from matpac_fast import model as model_module
from matpac_fast.config import MatpacConfig
from matpac_fast.errors import ConfigError
from matpac_fast.model import Matpac
from matpac_fast.nn.linear import is_plain
from matpac_fast.nn.statistics import effective_rank, summarise, token_sums
from matpac_fast.nn.vit import shorten_positions

# What no checkpoint holds, from the golden files' own description.
GOLDEN_OPTIONS = dict(num_heads=2, predictor_heads=4, max_steps=1000, teacher_temp_warmup=100)
TINY = dict(n_frames=64, width=32, depth=2, num_heads=2, predictor_width=24, predictor_depth=2, predictor_heads=2)
TINY |= dict(head_hidden=40, head_bottleneck=16, prototypes=24)


def weights(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[2:]: value for name, value in arrays.items() if name.startswith("w/")}


def group(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def close(got: Tensor, want: Tensor, relative: float) -> None:
    scale = want.abs().max().clamp(min=1e-6)
    error = (got.double() - want.double()).abs().max() / scale
    assert error <= relative, f"relative error {error:.2e} of the largest entry, allowed {relative:.0e}"


@pytest.mark.parametrize("name", ["train_matpac", "train_mcl"])
def test_one_step_equals_the_official_step(golden, name):
    g = golden(name)
    model = Matpac.from_official(weights(g), **GOLDEN_OPTIONS)
    step = int(g["num_updates"])
    out = model(g["source"], g["ids_shuffle"], step=step, statistics=True)
    close(out.loss, g["loss"], 1e-6)
    close(out.loss_pred, g["loss_pred"], 2e-6)
    close(out.loss_cls, g["loss_cls"], 2e-6)

    out.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = checkpoint.from_official_names(group(g, "grad/"))
    for key, want in gradients.items():
        close(parameters[key].grad, want, 1e-5)
    assert {k for k, p in parameters.items() if p.grad is not None} == set(gradients)

    model.update_teachers(step)
    after = model.official_state_dict()
    close(after["cls_head_loss.center"], g["center_after"], 1e-6)
    for key, want in group(g, "ema/").items():
        close(after["_ema"][key], want, 1e-7)
    for key, want in group(g, "ema_cls/").items():
        close(after["_cls_head_ema"][key], want, 1e-7)


@pytest.mark.parametrize("name", ["train_matpac", "train_mcl"])
def test_every_intermediate_equals_the_official_one(golden, name):
    g = golden(name)
    model = Matpac.from_official(weights(g), **GOLDEN_OPTIONS)
    with torch.no_grad():
        visible, masked = model.frontend.split(g["source"], g["ids_shuffle"], model.config.n_visible())
        z_visible = model.student(visible)
        z_pred = model.predictor(z_visible, g["ids_shuffle"])
        z_target = model.teacher(masked)
        close(z_visible, g["z_visible"], 2e-6)
        close(z_pred, g["z_pred"], 2e-6)
        close(z_target, g["z_target_with_cls"], 2e-6)
        guess = z_pred
        if name == "train_mcl":
            distance = (torch.nn.functional.normalize(z_pred, dim=-1) * z_target[:, 1:, None]).sum(-1)
            best = distance.argmax(-1)
            guess = z_pred.gather(2, best[..., None, None].expand(-1, -1, 1, z_pred.shape[-1])).squeeze(2)
        logits = model.head(guess) @ model.head.last_layer.matrix().T
        teacher_logits = model.teacher_head(z_target[:, 1:]) @ model.teacher_head.last_layer.matrix().T
    close(logits, g["logits_student"], 5e-6)
    close(teacher_logits, g["logits_teacher"], 5e-6)
    temperature = model.teacher_temperature(int(g["num_updates"]))
    close(((teacher_logits - model.center) / temperature).softmax(-1), g["p_teacher"], 1e-5)


@pytest.mark.parametrize("rows", [5, 10**6], ids=["by blocks", "at once"])
@pytest.mark.parametrize("name", ["train_matpac", "train_mcl"])
def test_statistics_and_schedules_equal_the_official_metrics(golden, name, rows, monkeypatch):
    g = golden(name)
    monkeypatch.setattr(model_module, "_SUMS_BYTES", 4 * len(g["center_after"]) * rows)
    model = Matpac.from_official(weights(g), **GOLDEN_OPTIONS)
    step = int(g["num_updates"])
    got = model(g["source"], g["ids_shuffle"], step=step, statistics=True).statistics
    assert got is not None
    metric = group(g, "metric/")
    n_masked = int(metric["count"])
    pairs = {
        "var_z_m": got["spread_target"] * 1000,
        "var_p_hat_m": got["spread_student_p"] * 1000,
        "var_p_m": got["spread_teacher_p"] * 1000,
        "cls_perplexity": got["teacher_perplexity"],
        "n_diff_target": got["prototypes_used"],
        "var_idx_targ": got["index_spread_teacher"],
        "var_idx_pred": got["index_spread_student"],
        "correct": got["agreement"] * n_masked,
        "ema_decay": torch.tensor(model.ema_decay(step) * 1000),
        "t_temp": torch.tensor(model.teacher_temperature(step) * 100),
    }
    heads = model.config.mcl_heads
    for i in range(heads):
        pairs[f"var_z_hat_m_{i}"] = got[f"spread_prediction_{i}"] * 1000
    if heads:
        pairs["mcl_temp"] = torch.tensor(model.mcl_temperature(step) * 1000)
    else:
        pairs["var_z_hat_m"] = got["spread_prediction"] * 1000
    for key, value in pairs.items():
        close(value, metric[key], 1e-5)
    assert set(metric) - set(pairs) == {"count", "sample_size"}


@pytest.mark.parametrize("name", ["trajectory_matpac", "trajectory_mcl"])
def test_thirty_steps_follow_the_official_run(golden, name):
    g = golden(name)
    model = Matpac.from_official(weights(g), **GOLDEN_OPTIONS)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = tuple(g["betas"].tolist())
    decay, eps = float(g["weight_decay"]), float(g["eps"])
    optimizer = torch.optim.AdamW(trained, float(g["lr"]), betas, eps, decay)
    for step in range(len(g["ids_shuffle"])):
        out = model(g["source"][step % 3], g["ids_shuffle"][step], step=step)
        model.update_teachers(step)
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, float(g["clip_norm"]))
        optimizer.step()
        for key, value in {
            "loss": out.loss,
            "loss_pred": out.loss_pred.mean(),
            "loss_cls": out.loss_cls.mean(),
            "grad_norm": norm,
        }.items():
            close(value.detach(), g[f"curve/{key}"][step], 5e-6)
    official = model.official_state_dict()
    aliases = {
        "ema_norm_weight": official["_ema"]["norm.weight"],
        "ema_cls_mlp0": official["_cls_head_ema"]["mlp.0.weight"],
        "center": official["cls_head_loss.center"],
    }
    for key, want in group(g, "final/").items():
        # Adam divides by the root of a second moment that may be near zero, so thirty steps of it magnify rounding,
        # which differs with the number of threads.
        close(aliases[key] if key in aliases else official[key], want, 1e-4)


def plain_predictor(model: Matpac, visible: Tensor, ids_shuffle: Tensor) -> Tensor:
    """The official order of work: restore the order, run every block on every token, shuffle again, keep the masked."""
    p = model.predictor
    v = visible.shape[1] - 1
    ids_restore = ids_shuffle.argsort(dim=1)
    x = p.embed(visible)
    tokens = torch.cat([x[:, 1:], p.mask_token.expand(len(x), ids_shuffle.shape[1] - v, -1)], dim=1)
    tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))
    positions = shorten_positions(p.pos_embed, p.freq, ids_shuffle.shape[1] // p.freq, like=p.mask_token)
    x = torch.cat([x[:, :1], tokens], dim=1) + positions
    for block in p.blocks:
        x = block(x)
    x = p.norm(x)[:, 1:].gather(1, ids_shuffle[..., None].expand(-1, -1, x.shape[-1]))[:, v:]
    return p.out(x)


def test_the_predictors_savings_change_nothing():
    model = Matpac(MatpacConfig(**TINY)).double()
    n_tokens, n_visible = model.config.n_tokens, model.config.n_visible()
    generator = torch.Generator().manual_seed(3)
    visible = torch.randn(3, 1 + n_visible, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_shuffle = torch.rand(3, n_tokens, generator=generator).argsort(dim=1)
    upstream = torch.randn(3, n_tokens - n_visible, 32, generator=generator, dtype=torch.float64)
    # The lean form reads no gradient into the masked-out parameters either.
    inputs = [visible, *(p for p in model.predictor.parameters())]
    lean, plain = model.predictor(visible, ids_shuffle), plain_predictor(model, visible, ids_shuffle)
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(lean, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class NoSync(TorchDispatchMode):
    """Fails on every operator that makes the host wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waits, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mcl_heads", [0, 3])
def test_a_step_never_waits_for_the_device(mcl_heads):
    model = Matpac(MatpacConfig(mcl_heads=mcl_heads, **TINY))
    spec = torch.randn(2, 80, 64)
    ids_shuffle = torch.rand(2, model.config.n_tokens).argsort(dim=1)
    with NoSync():
        out = model(spec, ids_shuffle, step=3, statistics=True)
        out.loss.backward()
        model.update_teachers(3)


def test_the_teachers_statistics_are_those_of_its_centred_logits():
    """As the loss has them: a centre that takes all prototypes but one away leaves a perplexity of 1."""
    model = Matpac(MatpacConfig(**TINY))
    model.center[1:] = 100.0
    got = model(torch.randn(2, 80, 64), statistics=True).statistics
    assert got is not None
    assert got["prototypes_used"] == 1
    torch.testing.assert_close(got["teacher_perplexity"], torch.tensor(1.0), rtol=0, atol=1e-4)


def test_the_teachers_entropy_is_that_of_its_probabilities():
    """From 0 to the logarithm of their number: training warns of a collapse by it."""
    latents = torch.randn(3, 8)
    for rows, want in (
        ([[0.25] * 4] * 3, math.log(4)),
        ([[1.0, 0, 0, 0]] * 3, 0.0),
        ([[0.5, 0.5, 0, 0]] * 3, math.log(2)),
    ):
        p = torch.tensor(rows)
        got = summarise(token_sums(latents, latents, p.flip(0), p))["teacher_entropy"]
        assert got.item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("tokens", "directions"), [(300, 48), (20, 48), (300, 3)])
def test_the_effective_rank_is_that_of_the_latents_singular_values(tokens, directions):
    """Also of fewer than there are channels: the rest is 0, and neither a NaN nor the rounding of float32."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(tokens, directions, generator=generator) * torch.logspace(0, -2, directions)
    latents = latents @ torch.randn(directions, 48, generator=generator)
    p = torch.full((tokens, 2), 0.5)
    singular = torch.linalg.svdvals(torch.nn.functional.normalize(latents.double(), dim=-1))
    share = singular / singular.sum() + 1e-7
    got = effective_rank(token_sums(latents, latents, p, p)["gram"])
    assert got == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-4)


@pytest.mark.parametrize("center_of", ["probabilities", "logits"])
def test_the_centre_is_of_what_the_configuration_says(center_of):
    model = Matpac(MatpacConfig(center_of=center_of, center_momentum=0.75, **TINY))
    spec, ids_shuffle = torch.randn(2, 80, 64), torch.rand(2, model.config.n_tokens).argsort(dim=1)
    with torch.no_grad():
        _, masked = model.frontend.split(spec, ids_shuffle, model.config.n_visible())
        features = model.teacher_head(model.teacher(masked)[:, 1:].flatten(0, 1))
        logits = features @ model.teacher_head.last_layer.matrix().T
    wanted = logits if center_of == "logits" else (logits / model.teacher_temperature(0)).softmax(-1)
    model(spec, ids_shuffle)
    model.update_teachers(0)
    torch.testing.assert_close(model.center, 0.25 * wanted.mean(0), rtol=1e-4, atol=1e-7)


def test_the_spread_of_rows_that_hardly_differ_is_not_the_rounding_of_their_squares():
    """As in a collapse, which the statistics are there to show: squares rounded to float32 are off by up to 6e-8."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.tensor([5.0, 2.0]) + 1e-4 * torch.randn(200, 2, generator=generator)).softmax(-1)
    latents = torch.randn(200, 8, generator=generator)
    got = summarise(token_sums(latents, latents, probabilities, probabilities))
    want = (probabilities.double().var(0) + 1e-6).sqrt().mean()
    for name in ("spread_student_p", "spread_teacher_p"):
        close(got[name], want, 1e-6)


def test_statistics_of_65536_prototypes_take_little_memory(monkeypatch, peak_growth):
    """A matrix of all probabilities would take 210 MiB, and each of the statistics several of them."""
    monkeypatch.setattr(model_module, "_SUMS_BYTES", 2**20)
    model, found = Matpac(MatpacConfig(**TINY | dict(prototypes=65_536))), []
    latents, features = torch.randn(840, model.config.width), torch.randn(840, model.config.head_bottleneck)
    assert peak_growth(lambda: found.append(model._sums(latents, latents, features, features, 0.05))) < 105
    assert found[0]["tokens"] == 840


@pytest.mark.parametrize("mcl_heads", [0, 3])
def test_all_that_is_trained_gets_a_gradient(mcl_heads):
    """What gets none has no moments: a checkpoint without them fits no optimiser, and DDP waits for it in vain."""
    model = Matpac(MatpacConfig(mcl_heads=mcl_heads, **TINY))
    model(torch.randn(2, 80, 64), step=1).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []


def test_autocast_reaches_neither_the_statistics_nor_the_patches():
    config = MatpacConfig.preset("tiny", n_frames=64, depth=1, predictor_depth=1)
    model = Matpac(config).train()
    torch.manual_seed(0)
    latents, features = torch.randn(30, config.width), torch.randn(30, config.head_bottleneck)
    plain = model._sums(latents, latents, features, features, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model._sums(latents, latents, features, features, 0.05)
    assert all(torch.equal(cast[name], value) for name, value in plain.items())
    # cuDNN would run a float32 convolution in TF32: the patches are a product, which does only what it is told.
    with profile() as seen:
        model.frontend(torch.randn(2, 80, 64))
    assert not [event.key for event in seen.key_averages() if "conv" in event.key]


def test_the_prototypes_products_take_16_bits_under_autocast_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode():
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
            assert model_module._factor(torch.empty(2, 3, device=device)).dtype == dtype


@pytest.mark.parametrize("kind", ["function", "method"])
@pytest.mark.parametrize("linear", ["qkv", "proj"])
def test_a_forward_pass_that_its_user_has_put_in_place_is_called(linear, kind):
    """As checkpointing, off-loading and many an adapter do it: on the instance, without a class of their own."""
    model, calls = Matpac(MatpacConfig(**TINY)), []
    block = model.predictor.blocks[-1]  # whose queries are taken apart from its keys
    layer = getattr(block.attn, linear)
    honest = layer.forward
    layer.forward = lambda x: calls.append(linear) or honest(x)
    if kind == "method":
        layer.forward = types.MethodType(lambda self, x: calls.append(linear) or honest(x), layer)
    model(torch.randn(2, 80, 64))
    assert calls == [linear]
    assert not is_plain(layer, torch.nn.Linear)


def test_accumulated_batches_move_the_centre_once():
    spec = torch.randn(4, 80, 64)
    whole, parts = Matpac(MatpacConfig(**TINY)), Matpac(MatpacConfig(**TINY))
    index = torch.arange(4)
    whole(spec, step=1, index=index)
    for half in (slice(0, 2), slice(2, 4)):
        parts(spec[half], step=1, index=index[half])
    for model in (whole, parts):
        model.update_teachers(1)
    torch.testing.assert_close(whole.center, parts.center, rtol=1e-5, atol=1e-9)


def test_without_a_training_pass_the_centre_stays():
    model = Matpac(MatpacConfig(**TINY))
    spec = torch.randn(2, 80, 64)
    model(spec, step=1)
    model.update_teachers(1)
    center = model.center.clone()
    assert center.abs().sum() > 0
    model.eval()(spec, step=2)
    model.update_teachers(2)
    assert torch.equal(model.center, center)


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 80, 60), (2, 80, 80), (80, 64)])
def test_a_spectrogram_of_another_shape_is_an_error(shape):
    with pytest.raises(ConfigError, match=r"expected \(B, 80, T\) with T a multiple of 16 of at most 64 frames"):
        Matpac(MatpacConfig(**TINY))(torch.randn(shape))
