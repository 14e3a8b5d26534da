"""One optimiser step: the official trajectory, gradient accumulation, clipping, and steps that must not count."""

from __future__ import annotations

import copy

import pytest
import torch

from matpac_fast import ops
from matpac_fast.errors import ConfigError
from matpac_fast.model import Matpac
from matpac_fast.nn.ema import ema_update
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.step import make_optimizer, train_step


def state(model, optimizer):
    """Every tensor that a step may change, copied."""
    moments = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *moments)]


def same_bits(before, after):
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture
def batch(model_config):
    torch.manual_seed(0)
    spec = torch.randn(4, model_config.n_mels, model_config.n_frames)
    return spec, ops.mask_shuffle(0, 0, torch.arange(4), model_config.n_tokens)


@pytest.fixture
def trained(model_config, train_config, batch):
    """A model and its optimiser after three steps, so that no moment and no centre is zero."""
    model = Matpac(model_config)
    optimizer = make_optimizer(model, train_config)
    for step in range(3):
        train_step(model, optimizer, [batch], step, lr=1e-3, clip_norm=3.0)
    return model, optimizer


@pytest.mark.parametrize("name", ["trajectory_matpac", "trajectory_mcl"])
def test_thirty_steps_follow_the_official_run(golden, name):
    g = golden(name)
    weights = {key[2:]: value for key, value in g.items() if key.startswith("w/")}
    model = Matpac.from_official(weights, num_heads=2, predictor_heads=4, max_steps=1000, teacher_temp_warmup=100)
    betas = (float(g["betas"][0]), float(g["betas"][1]))
    config = TrainConfig(lr=float(g["lr"]), betas=betas, eps=float(g["eps"]), weight_decay=float(g["weight_decay"]))
    optimizer = make_optimizer(model, config)
    for step, ids_shuffle in enumerate(g["ids_shuffle"]):
        piece = (g["source"][step % 3], ids_shuffle)
        got = train_step(model, optimizer, [piece], step, float(g["lr"]), float(g["clip_norm"]))
        for key in ("loss", "loss_pred", "loss_cls", "grad_norm"):
            assert float(getattr(got, key)) == pytest.approx(float(g[f"curve/{key}"][step]), rel=5e-6)
    official = model.official_state_dict()
    final = {key.removeprefix("final/"): value for key, value in g.items() if key.startswith("final/")}
    assert final
    for key, want in final.items():
        got = {
            "ema_norm_weight": official["_ema"]["norm.weight"],
            "ema_cls_mlp0": official["_cls_head_ema"]["mlp.0.weight"],
            "center": official["cls_head_loss.center"],
        }.get(key, official.get(key))
        # Adam divides small gradients by their own size: allow a thousandth of the way the weights can have gone.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(g["lr"]) * len(g["ids_shuffle"]))


def test_accumulation_changes_nothing_but_rounding(model_config, train_config, batch):
    spec, ids = batch
    runs = []
    for n in (1, 2, 4):
        model = Matpac(model_config)
        optimizer = make_optimizer(model, train_config)
        for step in range(4):
            pieces = list(zip(spec.chunk(n), ids.chunk(n), strict=True))
            measured = train_step(model, optimizer, pieces, step, lr=1e-2, clip_norm=0.5)
        runs.append((measured, model.state_dict()))
    for measured, weights in runs[1:]:
        torch.testing.assert_close(measured.loss, runs[0][0].loss)
        torch.testing.assert_close(measured.grad_norm, runs[0][0].grad_norm)
        # Adam's first steps divide small gradients by their own size, so rounding shows in the weights.
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weights["center"], runs[0][1]["center"])


@pytest.mark.parametrize("clip_norm", [0.01, 1e4])
def test_clipping_is_torchs(model_config, train_config, batch, clip_norm):
    ours, theirs = Matpac(model_config), Matpac(model_config)
    a, b = make_optimizer(ours, train_config), make_optimizer(theirs, train_config)
    measured = train_step(ours, a, [batch], 0, lr=train_config.lr, clip_norm=clip_norm)
    theirs(*batch).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
    assert (norm > clip_norm) == (clip_norm < 1)
    b.step()
    torch.testing.assert_close(measured.grad_norm, norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, moment in b.state.get(q, {}).items():  # after one step the gradient and its square, times a constant
            torch.testing.assert_close(a.state[p][key], moment, rtol=1e-5, atol=0)


@pytest.mark.parametrize("clip_norm", [0.01, 1e4])
def test_a_model_of_float64_is_trained_in_float64(model_config, train_config, batch, clip_norm):
    spec, ids = batch
    ours, theirs = Matpac(model_config).double(), Matpac(model_config).double()
    optimizer = make_optimizer(ours, train_config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, 1e-2, train_config.betas, train_config.eps, train_config.weight_decay)
    for step in range(3):
        measured = train_step(ours, optimizer, [(spec.double(), ids)], step, lr=1e-2, clip_norm=clip_norm)
        out = theirs(spec.double(), ids, step=step)
        out.loss.backward()
        theirs.update_teachers(step)
        torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        adamw.step()
        adamw.zero_grad()
        assert measured.loss.dtype == torch.float64
        torch.testing.assert_close(measured.loss, out.loss, rtol=1e-6, atol=0)
    # Where it clips, the scale has float32's digits, and Adam divides small gradients by their own size.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-5 if clip_norm < 1 else 1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_bad_input_leaves_everything_as_it_was(trained, batch, value):
    model, optimizer = trained
    before = state(model, optimizer)
    spec, ids = batch[0].clone(), batch[1]
    spec[1, 3, 5] = value
    measured = train_step(model, optimizer, [(spec, ids)], 3, lr=1e-3, clip_norm=3.0)
    assert measured.bad
    assert same_bits(before, state(model, optimizer))
    assert all(p.grad is None for p in model.parameters())

    # The next step goes on as if nothing had been.
    untouched = copy.deepcopy(model)
    other = make_optimizer(untouched, TrainConfig())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    good = [train_step(m, o, [batch], 4, lr=1e-3, clip_norm=3.0) for m, o in ((model, optimizer), (untouched, other))]
    assert not good[0].bad
    assert same_bits(state(model, optimizer), state(untouched, other))
    assert not same_bits(before, state(model, optimizer))


def test_a_finite_loss_with_a_bad_gradient_is_skipped_too(trained, batch):
    model, optimizer = trained
    before = state(model, optimizer)
    handle = model.student.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    measured = train_step(model, optimizer, [batch], 3, lr=1e-3, clip_norm=3.0)
    handle.remove()
    assert measured.loss.isfinite()
    assert measured.bad
    assert same_bits(before, state(model, optimizer))


def test_one_bad_piece_spoils_the_step_but_not_the_centre(trained, batch):
    model, optimizer = trained
    before = state(model, optimizer)
    spec, ids = batch[0].clone(), batch[1]
    spec[3] = float("nan")
    measured = train_step(model, optimizer, list(zip(spec.chunk(2), ids.chunk(2), strict=True)), 3, 1e-3, 3.0)
    assert measured.bad
    assert same_bits(before, state(model, optimizer))


def test_the_averages_can_be_skipped_on_the_device(model_config):
    """What a GPU does: the flag is never read by the host."""
    model = Matpac(model_config)
    before = [p.clone() for p in model.teacher.parameters()]
    ema_update(model.teacher, model.student, 0.9, skip=torch.tensor(True))
    assert same_bits(before, list(model.teacher.parameters()))
    twin = copy.deepcopy(model)
    ema_update(model.teacher, model.student, 0.9, skip=torch.tensor(False))
    ema_update(twin.teacher, twin.student, 0.9)
    for p, q in zip(model.teacher.parameters(), twin.teacher.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_an_average_of_16_bits_is_refused(model_config, cast):
    """Of a decay of 0.9999 bfloat16 keeps 1: two thousand steps moved the teacher by a fiftieth of what they should."""
    model = getattr(Matpac(model_config), cast)()
    before = [p.clone() for p in model.teacher.parameters()]
    with pytest.raises(ConfigError, match="float16, in which an average hardly moves: .* expected float32: keep"):
        model.update_teachers(1)
    assert same_bits(before, list(model.teacher.parameters()))


def test_temperatures_and_decays_on_the_device_are_those_of_the_step(model_config, train_config, batch):
    """As `schedule` takes them in a loop of one's own: without the flag, too."""
    models = [Matpac(model_config), Matpac(model_config)]
    schedule = models[1].schedule(3)
    on_device = schedule._replace(
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in schedule._asdict().items() if value}
    )
    losses = [models[0](*batch, step=3).loss, models[1](*batch, step=10**6, schedule=on_device).loss]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    models[0].update_teachers(3)
    models[1].update_teachers(10**6, schedule=on_device)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-6, atol=1e-8)
    optimizers = [make_optimizer(model, train_config) for model in models]
    steps = [
        train_step(models[0], optimizers[0], [batch], 3, 1e-3, 3.0),
        train_step(models[1], optimizers[1], [batch], 10**6, torch.tensor(1e-3), 3.0, schedule=on_device),
    ]
    torch.testing.assert_close(steps[1].loss, steps[0].loss, rtol=1e-6, atol=0)
    for part in (lambda model: model.teacher.state_dict(), lambda model: model.center):
        torch.testing.assert_close(part(models[1]), part(models[0]), rtol=1e-5, atol=1e-7)


def test_bf16_follows_float32(model_config, train_config, batch):
    losses = {}
    for precision in ("float32", "bf16"):
        model = Matpac(model_config)
        optimizer = make_optimizer(model, train_config)
        losses[precision] = torch.stack(
            [train_step(model, optimizer, [batch], s, 1e-3, 3.0, precision).loss for s in range(5)]
        )
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses["bf16"].dtype == torch.float32
    torch.testing.assert_close(losses["bf16"], losses["float32"], rtol=2e-2, atol=0)
    assert not torch.equal(losses["bf16"], losses["float32"])


@pytest.mark.gpu
def test_no_host_synchronisation(model_config, train_config, batch):
    model = Matpac(model_config).cuda()
    optimizer = make_optimizer(model, train_config)
    piece = tuple(tensor.cuda() for tensor in batch)
    train_step(model, optimizer, [piece], 0, 1e-3, 3.0, "bf16")
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in (1, 2):
            train_step(model, optimizer, [piece], step, 1e-3, 3.0, "bf16", statistics=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_pass_that_was_not_finite_leaves_the_centre_as_it_is(trained, batch):
    """Also where a loop of one's own left that step out, and the next update comes after a good one."""
    model, center = trained[0], trained[0].center.clone()
    model(batch[0] * float("nan"), step=3)
    model(batch[0], step=4)
    model.update_teachers(4)
    assert torch.equal(model.center, center)
    model(batch[0], step=5)
    model.update_teachers(5)
    assert model.center.isfinite().all()
    assert not torch.equal(model.center, center)
