"""What a user wraps, prunes or changes in a model is what runs."""

from __future__ import annotations

import pytest
import torch
from ranks import needs_shards
from torch.nn.utils import prune

from matpac_fast import Matpac, MatpacConfig
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.nn import linear
from matpac_fast.nn.ema import ema_update
from matpac_fast.vit_encoder import Encoder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Adapted(torch.nn.Module):
    """A layer and what is learnt beside it, with the layer's weights under their names, as PEFT wraps one."""

    def __init__(self, layer: torch.nn.Conv2d):
        super().__init__()
        self.layer, self.more = layer.requires_grad_(False), torch.nn.Conv2d(1, layer.out_channels, 16, stride=16)
        torch.nn.init.zeros_(self.more.weight)
        torch.nn.init.zeros_(self.more.bias)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        return self.layer(x) + self.more(x)


def test_a_wrapped_patch_projection_is_called():
    model, spec = Matpac(MatpacConfig.preset("nano")), torch.randn(2, 80, 96)
    plain = model(spec)
    proj = Adapted(model.frontend.patch_embed.proj)
    model.frontend.patch_embed.proj = proj  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = model(spec)
    torch.testing.assert_close(wrapped.loss, plain.loss, rtol=1e-5, atol=1e-6)
    wrapped.loss.backward()
    assert proj.more.weight.grad is not None
    assert proj.more.weight.grad.abs().max() > 1e-4
    torch.nn.init.normal_(proj.more.weight)
    # Of each token: over all of them an untrained model's losses have much the same mean, whatever it sees.
    assert (model(spec).loss_pred - plain.loss_pred).abs().max() > 1e-2


def test_a_wrapped_patch_projection_of_an_encoder_is_called():
    encoder, waves = Encoder(n_frames=64, width=32, depth=2, num_heads=2), torch.randn(2, 16_000) / 10
    plain = encoder(waves)
    encoder.requires_grad_(False)
    proj = Adapted(encoder.frontend.patch_embed.proj)
    encoder.frontend.patch_embed.proj = proj  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = encoder(waves)
    torch.testing.assert_close(wrapped, plain, rtol=1e-4, atol=1e-5)
    wrapped.sum().backward()
    assert proj.more.weight.grad is not None


@pytest.mark.parametrize("what", ["block", "attention", "attention replaced", "mlp"])
def test_whatever_is_changed_in_a_block_of_an_encoder_is_what_runs(what):
    """Also for windows of two lengths, which otherwise go through the layers together."""
    encoder, wave = Encoder(n_frames=64, width=32, depth=2, num_heads=2), torch.randn(12_000) / 10
    plain = encoder.embed(wave, 16_000, temporal_support=0.5).values
    block = encoder.student.blocks[0]
    if what == "attention replaced":
        block.attn.forward = lambda x, first_query=0: 0 * x[:, first_query:]
    else:
        part = {"block": block, "attention": block.attn, "mlp": block.mlp}[what]
        part.register_forward_hook(lambda module, args, out: 0 * out)
    changed = encoder.embed(wave, 16_000, temporal_support=0.5).values
    assert ((changed - plain).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
@pytest.mark.parametrize(
    "name", ["frontend.patch_embed.proj", "student.blocks.0.attn.qkv", "predictor.blocks.1.attn.qkv", "head.mlp.1"]
)
def test_a_hook_on_every_module_is_called_as_one_on_its_own(name, kind, monkeypatch):
    """Layers that are read and not called would leave it out without a word, and only where a kernel is faster."""
    monkeypatch.setattr(linear, "_LEAST", 0)
    model, spec = Matpac(MatpacConfig.preset("nano", depth=2, predictor_depth=2)), torch.randn(2, 80, 96)
    layer, plain = model.get_submodule(name), model(spec).loss_pred + model(spec).loss_cls

    def double(module, args, *out):
        return None if module is not layer else 2 * out[0] if out else (2 * args[0],)

    with getattr(layer, f"register_forward_{kind}")(double):
        out = model(spec)
        alone = out.loss_pred + out.loss_cls
    with getattr(torch.nn.modules.module, f"register_module_forward_{kind}")(double):
        out = model(spec)
        among_all = out.loss_pred + out.loss_cls
    assert (alone - plain).abs().max() > 1e-4
    torch.testing.assert_close(among_all, alone)


def test_a_pruned_patch_projection_trains():
    model, spec = Matpac(MatpacConfig.preset("nano")), torch.randn(2, 80, 96)
    prune.l1_unstructured(model.frontend.patch_embed.proj, "weight", amount=0.5)
    for step in range(3):
        model(spec, step=step).loss.backward()


def test_a_changed_head_is_what_runs():
    model, spec = Matpac(MatpacConfig.preset("nano")), torch.randn(2, 80, 96)
    plain = model(spec)
    model.head.mlp[1] = torch.nn.ReLU()
    assert model(spec).loss != plain.loss
    model.head.mlp = torch.nn.Sequential(*model.head.mlp, torch.nn.Identity())
    model(spec).loss.backward()


@pytest.mark.parametrize("what", ["tanh", "hook on an activation", "hook on all of it", "shorter"])
def test_whatever_is_changed_in_a_head_is_what_runs(what):
    head, x = Matpac(MatpacConfig.preset("nano")).head, torch.randn(7, 192)
    plain = head(x)
    if what == "tanh":
        head.mlp[1] = torch.nn.GELU(approximate="tanh")
    elif what == "shorter":
        head.mlp = head.mlp[:4]
    else:
        (head.mlp[1] if "activation" in what else head.mlp).register_forward_hook(lambda module, args, out: 2 * out + 1)
    changed = head(x)
    torch.testing.assert_close(changed, torch.nn.functional.normalize(head.mlp(x), dim=-1))
    assert changed.shape != plain.shape or (changed - plain).abs().max() > 1e-6


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_model_made_on_meta_takes_its_step(way):
    config, spec = MatpacConfig.preset("nano"), torch.randn(2, 80, 96)
    plain = Matpac(config)
    with torch.device("meta"):
        model = Matpac(config)
    if way == "to_empty":
        model = model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)
    model.load_state_dict(plain.state_dict(), assign=way == "assign")
    model.teacher.requires_grad_(False)
    for each in (plain, model):
        each(spec, step=1).loss.backward()
        each.update_teachers(1)
    assert torch.equal(model.center, plain.center)


def test_an_encoder_is_compiled_and_differentiated_at_any_length():
    encoder = Encoder(n_frames=32, width=32, depth=1, num_heads=2).requires_grad_(True)
    compiled = torch.compile(encoder, backend="aot_eager")
    for rows, samples in ((2, 4_000), (1, 7_000), (3, 9_000)):
        waves = torch.randn(rows, samples) / 10
        torch.testing.assert_close(compiled(waves), encoder(waves), rtol=1e-5, atol=1e-5)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(encoder, p, (waves,)).square().sum())(parameters)
    encoder(waves).square().sum().backward()
    for name, p in encoder.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item())


def adapt(block):
    block.attn.qkv = torch.nn.Sequential(block.attn.qkv, torch.nn.Linear(576, 576))


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("student", adapt, r"proj.weight \(192, 192\) .*qkv.1.weight \(576, 576\)"),
        ("student", lambda b: prune.l1_unstructured(b.attn.proj, "weight", 0.3), r"proj.weight .*proj.bias \(192,\)"),
        ("student", lambda b: prune.l1_unstructured(b.norm1, "weight", 0.3), r"norm1.weight \(192,\) .*norm1.bias"),
        ("student", lambda b: setattr(b.mlp.fc2, "bias", None), r"fc2.bias \(192,\) .*norm.weight"),
        ("head", lambda mlp: mlp.append(torch.nn.PReLU()), r"last_layer.weight_g .*mlp.5.weight \(1,\)"),
    ],
)
def test_a_teacher_does_not_average_layers_of_another_kind(side, change, message):
    """Parameters paired by their order alone were others' or broadcast to others' shape."""
    model = Matpac(MatpacConfig.preset("nano", depth=1, predictor_depth=1))
    change(model.student.blocks[0] if side == "student" else model.head.mlp)
    before = [p.clone() for p in model.teacher.parameters()]
    with pytest.raises(ConfigError, match=f"{message}.*layers were replaced, pruned or parametrized"):
        ema_update(*((model.teacher, model.student) if side == "student" else (model.teacher_head, model.head)), 0.5)
    assert all(torch.equal(p, was) for p, was in zip(model.teacher.parameters(), before, strict=True))


def test_a_compiled_block_is_averaged():
    model, plain = (Matpac(MatpacConfig.preset("nano", depth=2, predictor_depth=1)) for _ in range(2))
    model.student.blocks[1] = torch.compile(model.student.blocks[1])  # pyright: ignore[reportArgumentType]
    for each in (model, plain):
        ema_update(each.teacher, each.student, 0.5)
    for p, q in zip(model.teacher.parameters(), plain.teacher.parameters(), strict=True):
        assert torch.equal(p, q)


def test_layers_without_a_bias_are_those_whose_bias_is_zero():
    model, spec = Matpac(MatpacConfig.preset("nano")), torch.randn(2, 80, 96)
    attn, embed = model.predictor.blocks[-1].attn, model.frontend.patch_embed
    torch.nn.init.zeros_(attn.qkv.bias)
    torch.nn.init.zeros_(embed.proj.bias)
    zero = model(spec)
    attn.qkv.bias = embed.proj.bias = None
    bare = model(spec)
    torch.testing.assert_close(bare.loss, zero.loss, rtol=1e-5, atol=1e-6)
    bare.loss.backward()
    assert attn.qkv.weight.grad is not None
    assert embed.proj.weight.grad is not None


@needs_shards
def test_under_mixed_precision_of_fsdp_a_step_is_that_of_the_model():
    """It hands out parameters in 16 bits and leaves buffers, which the positions are, in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, plain = (Matpac(MatpacConfig.preset("nano", depth=2, predictor_depth=2)) for _ in range(2))
    spec = torch.randn(2, 80, 96)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for part in (*model.student.blocks, *model.predictor.blocks, *model.teacher.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        for each in (model, plain):
            each(spec, step=1).loss.backward()
            each.update_teachers(1)
        for sharded, parameter in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(sharded.full_tensor(), parameter)  # pyright: ignore[reportAttributeAccessIssue]
            if parameter.grad is not None:
                error = sharded.grad.full_tensor() - parameter.grad  # pyright: ignore
                assert error.abs().max() < 0.1 * parameter.grad.abs().max()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
def test_a_quantized_encoder_embeds_and_says_that_it_has_neither_file_nor_id(tmp_path):
    encoder, wave = Encoder(n_frames=64, width=32, depth=2, num_heads=2), torch.randn(12_000) / 10
    plain = encoder.embed(wave, 16_000).values
    quantized = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear}, dtype=torch.qint8)
    assert (quantized.embed(wave, 16_000).values - plain).abs().max() < 0.1 * plain.std()
    with pytest.raises(CheckpointError, match=r"save: student\.blocks\.0\.attn\.qkv\.\S+ is quantized; expected plain"):
        quantized.save(tmp_path / "q.safetensors")
    with pytest.raises(ConfigError, match="is quantized or cut by FSDP; an id is of whole, plain weights"):
        _ = quantized.id
