"""Linear layers by oneDNN: what torch's own product gives, to rounding, and only where nothing else is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

from matpac_fast import Matpac, MatpacConfig, backend, use_backend
from matpac_fast.nn import linear as module
from matpac_fast.nn.linear import linear, linear_gelu
from matpac_fast.ops._onednn import onednn_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SHAPES = [((7, 5, 19), 23), ((64, 96), 160), ((3, 1, 1), 2)]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a CPU where oneDNN multiplies faster, for any size; lists the layers that it is asked for."""
    calls, product = [], module.onednn_linear
    monkeypatch.setattr(module, "_LEAST", 0)
    monkeypatch.setattr(backend, "_mkl_lags", lambda: True)
    monkeypatch.setattr(module, "onednn_linear", lambda *args: calls.append(len(calls)) or product(*args))
    return calls


def problem(shape: tuple[int, ...], out: int, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(out)
    return nn.Linear(shape[-1], out, bias), torch.randn(shape), torch.randn(*shape[:-1], out)


def run(function, layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(layer, leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_results_and_gradients_are_near_to_float64s(shape, out, bias, asked):
    layer, x, grad = problem(shape, out, bias)
    found, again = (run(linear, layer, x, grad) for _ in range(2))
    assert len(asked) == 2
    exact = run(lambda f, x: f(x), layer.double(), x.double(), grad.double())
    for value, same, best in zip(found, again, exact, strict=True):
        assert torch.equal(value, same)
        assert (value - best).abs().max() <= 1e-6 * max(1, shape[-1]) ** 0.5 * best.abs().max()


def test_memory_in_any_order():
    layer, x, grad = problem((6, 4, 12), 8)
    want = run(linear, layer, x, grad)
    apart = x.transpose(0, 2).contiguous().transpose(0, 2), grad[:1, :1].expand(6, 4, 8)
    assert torch.equal(run(linear, layer, apart[0], grad)[0], want[0])
    found, exact = (run(f, layer, x, apart[1]) for f in (linear, lambda f, x: f(x)))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    layer, x, _ = problem((2, 4, 6), 3)
    for bias in (layer.bias, None):
        torch.library.opcheck(torch.ops.matpac_fast.linear.default, (x.requires_grad_(), layer.weight, bias))
    torch.library.opcheck(torch.ops.matpac_fast.linear_gradients.default, (torch.randn(8, 3), torch.randn(8, 6)))


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=str)
def test_compiles_whole(shape, monkeypatch):
    monkeypatch.setattr(module, "onednn_linear", onednn_linear)  # without the list
    torch._dynamo.reset()
    layer, x, grad = problem(shape, 3)
    graphs = []
    compiled = torch.compile(
        lambda layer, x: linear(layer, x),
        fullgraph=True,
        backend=lambda graph, inputs: graphs.append(str(graph.graph)) or aot_eager(graph, inputs),
    )
    for a, b in zip(run(compiled, layer, x, grad), run(linear, layer, x, grad), strict=True):
        assert torch.equal(a, b)
    assert "matpac_fast.linear" in graphs[0]


class Called(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.layer, x)


def test_frozen_weights_get_no_gradient():
    layer, x, grad = problem((4, 6), 3)
    layer.requires_grad_(False)
    leaf = x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(linear(layer, leaf), leaf, grad)[0], grad @ layer.weight)
    layer.weight.requires_grad_()
    linear(layer, x.detach()).backward(grad)
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.weight.grad, grad.T @ x.detach())


def test_second_derivatives():
    layer, x, _ = problem((4, 6), 3)
    leaf, found = x.requires_grad_(), []
    for function in (linear, lambda f, x: f(x)):
        (first,) = torch.autograd.grad(function(layer, leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [leaf, layer.weight]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_training_step_equals_the_one_on_torchs_products(asked):
    losses, gradients = [], []
    for name in ("auto", "reference"):
        model = Matpac(MatpacConfig.preset("nano"))
        spec = torch.randn(2, 80, 608, generator=torch.Generator().manual_seed(0))
        before = len(asked)
        with use_backend(name):
            out = model(spec, step=3)
            out.loss.backward()
        assert (len(asked) > before + 30) == (name == "auto")
        losses.append(out.loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, own in gradients[0].items():
        other = gradients[1][name]
        assert (own - other).abs().max() <= 1e-4 * other.abs().max() + 1e-9, name


def test_what_is_left_to_torch(asked, monkeypatch):
    layer, x, _ = problem((4, 6), 3)
    want = layer(x)

    def left(layer: nn.Linear, x: Tensor = x) -> Tensor:
        y = linear(layer, x)
        assert asked == []
        return y

    with use_backend("reference"):
        assert torch.equal(left(layer), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert left(layer).dtype == torch.bfloat16
    left(problem((4, 6), 3)[0].double(), x.double())
    left(problem((4, 6), 3)[0].bfloat16(), x.bfloat16())
    assert torch.equal(torch.vmap(lambda x: left(layer, x))(x[:, None])[:, 0], want)
    with FlopCounterMode(display=False) as counter:
        left(layer)
    assert counter.get_total_flops() == 2 * 4 * 6 * 3
    still = problem((4, 6), 3)[0].requires_grad_(False)
    assert "aten::linear" in str(torch.jit.trace(lambda x: left(still, x), x, check_trace=False).graph)
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(Called(still)), (x,), strict=False)
    assert "aten.linear" in str(program.graph)
    assert torch.equal(left(nn.Sequential(layer)), want)  # type: ignore[arg-type]  # in its place, without its sizes
    hooked = problem((4, 6), 3)[0]
    hooked.register_forward_hook(lambda *_: None)
    left(hooked)
    with torch.backends.mkldnn.flags(enabled=False):
        left(layer)
    monkeypatch.setattr(module, "_LEAST", 4 * 6 * 3 + 1)
    left(layer)
    monkeypatch.setattr(module, "_LEAST", 4 * 6 * 3)
    linear(layer, x)
    assert asked.pop() == 0
    torch.testing.assert_close(linear_gelu(layer, x), nn.functional.gelu(want))
    assert asked.pop() == 0
    monkeypatch.setattr(backend, "_mkl_lags", lambda: False)
    left(layer)


def test_which_cpus_it_is_for(monkeypatch):
    monkeypatch.undo()
    native = pytest.importorskip("matpac_fast._C", reason="needs the native extension")
    for amd, capability, mkl in (
        (True, "AVX512", True),
        (False, "AVX512", True),
        (True, "AVX2", True),
        (True, "AVX512", False),
    ):
        monkeypatch.setattr(native, "cpu_is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        backend._mkl_lags.cache_clear()
        assert backend.prefers_onednn(torch.device("cpu")) == (amd and capability == "AVX512" and mkl)
        assert not backend.prefers_onednn(torch.device("meta"))
    monkeypatch.undo()
    backend._mkl_lags.cache_clear()


def test_a_bfloat16_layer_is_exported_for_any_batch():

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 256).bfloat16()

        def forward(self, x):
            return linear_gelu(self.layer, x)

    with torch.no_grad():
        model, x = Layer(), torch.randn(3, 5, 64).bfloat16()
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        x = torch.randn(7, 5, 64).bfloat16()
        assert torch.equal(exported.module()(x), model(x))


def test_a_bfloat16_layer_of_no_inputs():
    x, layer = torch.empty(2, 3, 0).bfloat16(), nn.Linear(0, 8).bfloat16()
    torch.testing.assert_close(linear_gelu(layer, x), nn.functional.gelu(layer(x)))
