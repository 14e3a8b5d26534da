"""Whole transformers on the fused kernels under Triton's interpreter: a training step like that of the plain blocks."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from matpac_fast import ops, use_backend
from matpac_fast.config import MatpacConfig
from matpac_fast.kernels._limits import MAX_WIDTH
from matpac_fast.model import Matpac
from matpac_fast.nn import fused, halves
from matpac_fast.nn.vit import Transformer

CONFIG = MatpacConfig.preset(
    "tiny", n_frames=32, width=64, num_heads=2, depth=2, predictor_width=64, predictor_heads=2, predictor_depth=2
)


def gradients(backend: str, mcl_heads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    calls = []
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda *args, **options: calls.append(1) or run(*args, **options))
    model = Matpac(CONFIG.replace(mcl_heads=mcl_heads)).train()
    spec = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(0))
    ids_shuffle = ops.mask_shuffle(0, 0, torch.arange(2), CONFIG.n_tokens)
    with use_backend(backend):
        with torch.autocast("cpu", torch.float16):
            out = model(spec, ids_shuffle, step=3)
        out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach()[None], **found}, len(calls)


@pytest.mark.parametrize("mcl_heads", [0, 2])
def test_a_step_is_that_of_the_plain_blocks(mcl_heads, monkeypatch):
    ours, fused_runs = gradients("triton", mcl_heads, monkeypatch)
    plain, plain_runs = gradients("reference", mcl_heads, monkeypatch)
    assert (fused_runs, plain_runs) == (3, 0)  # student, teacher and predictor
    assert ours.keys() == plain.keys()
    for name, want in plain.items():
        difference = (ours[name] - want).norm() / want.norm()
        assert difference < 0.02, f"{name}: {difference:.3g}"


def test_who_is_served():
    model = Matpac(CONFIG)
    blocks, norm = model.student.blocks, model.student.norm
    x = torch.randn(1, 3, 64)
    with use_backend("triton"):
        assert not fused.serves(blocks, norm, x)  # float32
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.serves(blocks, norm, x)
            assert not fused.serves(blocks, norm, torch.empty(1, 3, MAX_WIDTH + 1))
            blocks[1].compile(backend="eager")
            assert not fused.serves(blocks, norm, x)
            assert not fused.serves(model.teacher.bfloat16().blocks, model.teacher.norm, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.serves(model.predictor.blocks, model.predictor.norm, x)  # a CPU's own way


class Adapted(torch.nn.Linear):
    """A layer as a user may put in the place of ours."""

    def forward(self, x):
        return 3 * super().forward(x)


class Wrapped(torch.nn.Module):
    """As activation checkpointing and FSDP wrap a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args)


def adapt(owner: str, name: str):
    def change(model: Transformer) -> None:
        parent = model.get_submodule(owner)
        layer = getattr(parent, name)
        new = Adapted(layer.in_features, layer.out_features)
        new.load_state_dict(layer.state_dict())
        setattr(parent, name, new)

    return change


def wrap(model: Transformer) -> None:
    model.blocks[1] = Wrapped(model.blocks[1])


def bare(model: Transformer) -> None:
    model.blocks[1].norm2 = torch.nn.LayerNorm(64, 1e-6, elementwise_affine=False)


def hook(name: str):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda module, args, out: 3 * out)


CHANGES = {
    "proj replaced": adapt("blocks.1.attn", "proj"),
    "fc1 replaced": adapt("blocks.1.mlp", "fc1"),
    "fc2 replaced": adapt("blocks.0.mlp", "fc2"),
    "block wrapped": wrap,
    "a norm without weights": bare,
    **{
        f"{name} hooked": hook(name)
        for name in ("blocks.0", "blocks.1.attn", "blocks.0.mlp", "blocks.1.mlp.fc1", "blocks.1.norm1", "norm")
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_user_changes_in_a_block_is_called(change):
    torch.manual_seed(0)
    model = Transformer(64, 2, 2, 2)
    x = torch.randn(1, 5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        before = model(x)
        change(model)
        want = model(x)
        with use_backend("triton"):
            got = model(x)
    assert (got - want).norm() < 0.01 * want.norm()
    if change not in (wrap, bare):
        assert (want - before).norm() > 0.02 * before.norm()  # the change is one


def through_layers(model: Transformer, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **options) -> torch.Tensor:
    """`fused.run` without halves: layer by layer, as torch.compile traces it."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_has_halves", lambda block: False)
        return fused.run(model.blocks, model.norm, x, **options)


def random_transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(64, 2, 2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


FROZEN = {
    "nothing": "",
    "all but one bias": "^(?!blocks.0.norm1.bias)",
    "weights": "weight",
    "biases": "bias",
    "the first block": "blocks.0",
    "the last block": "blocks.1",
}


@pytest.mark.parametrize("first_query", [0, 3])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_halves_have_the_gradients_of_the_layers(frozen, first_query, monkeypatch):
    model = random_transformer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not re.search(frozen, name))
    x = torch.randn(3, 5, 64, requires_grad=frozen != "blocks.0")
    grad, found = torch.randn(3, 5 - first_query, 64), []
    for run in (fused.run, lambda *args, **options: through_layers(model, args[2], monkeypatch, **options)):
        with use_backend("triton"), torch.autocast("cpu", torch.float16):
            out = run(model.blocks, model.norm, x, first_query=first_query)
        out.backward(grad)
        found.append({"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
        x.grad = None
        model.zero_grad()
    ours, layers = found
    assert torch.equal(ours.pop("out"), layers.pop("out"))
    for name, want in layers.items():
        assert (ours[name] is None) == (want is None), name
        if want is not None:
            assert ours[name].dtype == torch.float32
            assert (ours[name] - want).norm() <= 1e-3 * want.norm(), name


def test_without_a_gradient_halves_compute_the_same(monkeypatch):
    model, x = random_transformer(), torch.randn(2, 5, 64)
    with use_backend("triton"), torch.autocast("cpu", torch.float16):
        want = fused.run(model.blocks, model.norm, x)
        monkeypatch.setattr(halves._Mlp, "apply", None)  # nor do they pay for one
        monkeypatch.setattr(halves._NormLinear, "apply", None)
        with torch.no_grad():
            assert torch.equal(fused.run(model.blocks, model.norm, x), want)


def test_a_step_s_few_numbers_are_a_kernel_s_too(monkeypatch):
    model, x = random_transformer(), torch.randn(2, 5, 64)
    with use_backend("triton"), torch.autocast("cpu", torch.float16), torch.no_grad():
        want = model(x)
        monkeypatch.setattr(ops, "attention", None)  # which may leave them to torch
        assert torch.equal(model(x), want)


def test_halves_are_once_differentiable():
    model, x = random_transformer(), torch.randn(2, 5, 64, requires_grad=True)
    with use_backend("triton"), torch.autocast("cpu", torch.float16):
        out = model(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_who_counts_products_sees_the_ops(monkeypatch):
    model, x = random_transformer(), torch.randn(2, 5, 64)
    monkeypatch.setattr(halves, "mlp", None)
    with use_backend("triton"), torch.autocast("cpu", torch.float16), torch.no_grad(), FlopCounterMode(display=False):
        model(x)


def test_what_a_half_returns_may_go_unused():
    """Each of its results alone has a gradient."""
    model = random_transformer()
    block = model.blocks[0]
    for index in (0, 1):
        x = torch.randn(2, 5, 64, requires_grad=True)
        delta = torch.randn(2, 5, 64, dtype=torch.float16, requires_grad=True)
        with use_backend("triton"), torch.autocast("cpu", torch.float16):
            found = halves.norm_linear(x, delta, block.mlp.fc2.bias, block.norm1, block.attn.qkv, torch.float16)
            mlp = halves.mlp(delta, x, block.attn.proj, block.norm2, block.mlp.fc1, block.mlp.fc2)
            layers = (
                ops.add_layer_norm(x, delta, block.mlp.fc2.bias, block.norm1, torch.float16),
                ops.add_layer_norm(
                    x, F.linear(delta, block.attn.proj.weight), block.attn.proj.bias, block.norm2, torch.float16
                ),
            )
            want = (
                (layers[0][0], block.attn.qkv(layers[0][1])),
                (layers[1][0], F.linear(block.mlp.hidden(layers[1][1]), block.mlp.fc2.weight)),
            )
        for ours, theirs in ((found, want[0]), (mlp, want[1])):
            assert torch.equal(ours[index], theirs[index])
            grad = torch.randn_like(theirs[index])
            mine, plain = (torch.autograd.grad(out[index], (x, delta), grad) for out in (ours, theirs))
            for got, expected in zip(mine, plain, strict=True):
                assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_a_compiler_sees_the_layers(monkeypatch):
    model, x = random_transformer(), torch.randn(2, 5, 64)
    grad, found = torch.randn(2, 5, 64), []
    with use_backend("triton"), torch.autocast("cpu", torch.float16):
        for call in (model, torch.compile(model, backend=aot_eager, fullgraph=True)):
            out = call(x)
            out.backward(grad)
            found.append([out.detach(), *(p.grad for p in model.parameters())])
            model.zero_grad()
            monkeypatch.setattr(halves, "mlp", None)
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


def same_gradients(model: Transformer, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With halves and layer by layer."""
    found = []
    for run in (model, lambda x: through_layers(model, x, monkeypatch)):
        with use_backend("triton"), torch.autocast("cpu", torch.float16):
            out = run(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


def test_attention_that_no_kernel_computes(monkeypatch):
    """As of heads of such a width, or more tokens than a program holds: the bias's gradient is then the product's."""
    torch.manual_seed(0)
    same_gradients(Transformer(48, 2, 2, 2), torch.randn(2, 5, 48), monkeypatch)


def test_no_sequences(monkeypatch):
    same_gradients(random_transformer(), torch.randn(0, 5, 64), monkeypatch)


def test_an_mlp_without_its_last_bias(monkeypatch):
    model = random_transformer()
    model.blocks[0].mlp.fc2.bias = None
    same_gradients(model, torch.randn(2, 5, 64), monkeypatch)


class Doubling(torch.nn.Parameter):
    """A weight whose product is its own affair, as that of quantised ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
            return 2 * found if function is F.linear else found


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_weights_that_multiply_in_their_own_way(layer, monkeypatch):
    model = random_transformer()
    for block in model.blocks:
        block.get_submodule(layer).weight = Doubling(block.get_submodule(layer).weight.data)
    same_gradients(model, torch.randn(2, 5, 64), monkeypatch)


def test_tensors_that_hold_nothing_outside_their_mode():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 5, 64)
    with use_backend("triton"), torch.autocast("cpu", torch.float16):
        assert random_transformer()(x).shape == (2, 5, 64)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_halves_keep_what_the_layers_keep(frozen, monkeypatch):
    model, x, kept = random_transformer(), torch.randn(3, 5, 64, requires_grad=True), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not re.search(frozen, name))
    for run in (model, lambda x: through_layers(model, x, monkeypatch)):
        bytes_of, held = {}, []

        def keep(tensor, bytes_of=bytes_of, held=held):
            held.append(tensor)  # so that no other takes its place
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        graph = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with use_backend("triton"), torch.autocast("cpu", torch.float16), graph:
            held.append(run(x))
        kept.append(sum(bytes_of.values()))
    assert kept[0] <= kept[1]
