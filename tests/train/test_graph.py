"""The step as a graph: on a CPU its operators recorded and run again, on a GPU the graph itself."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from recorded import record
from stops import after

from matpac_fast import ops
from matpac_fast.errors import ConfigError
from matpac_fast.model import Matpac
from matpac_fast.train import graph as module
from matpac_fast.train import pretrain, read_log
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.graph import CudaRecorder, GraphedStep
from matpac_fast.train.schedule import learning_rate
from matpac_fast.train.step import make_optimizer, train_step

STEPS = 12


def batch(config, step, device="cpu", n_frames=32):
    """Two pieces; every length of crop, and a mask of the step's own."""
    generator = torch.Generator().manual_seed(step)
    spec = torch.randn(4, config.n_mels, n_frames, generator=generator).to(device)
    n_tokens = config.freq * (n_frames // config.patch_size)
    ids_shuffle = ops.mask_shuffle(0, step, torch.arange(4, device=device), n_tokens)
    return list(zip(spec.chunk(2), ids_shuffle.chunk(2), strict=True))


def lr_of(step):
    return learning_rate(step, 1e-3, 4, STEPS)


def everything(model, optimizer):
    """Every tensor that a step may change."""
    moments = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [*model.state_dict().values(), *moments]


def close(ours, theirs):
    """To rounding: a rate that is a tensor is float32, a Python number is not."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture(params=[0, 3], ids=["matpac", "mcl"])
def config(request, model_config):
    # The temperature of MCL reaches its end, the hard minimum, on the way.
    return model_config.replace(mcl_heads=request.param, mcl_temp_start=1.0, mcl_temp_end=0.1, mcl_temp_decay=0.7)


def test_a_graph_is_the_step(config):
    """Schedules move, lengths and statistics take turns, and a bad batch leaves everything as it was."""
    models = [Matpac(config).train(), Matpac(config).train()]
    optimizers = [make_optimizer(model, TrainConfig()) for model in models]
    kinds = []

    def recorder(run):
        kinds.append(run)
        return record(run)

    graphed = GraphedStep(models[1], optimizers[1], 3.0, "float32", recorder)
    for step in range(STEPS):
        pieces = batch(config, step, n_frames=16 if step % 5 == 4 else 32)
        if step == 8:
            pieces[1][0][1, 2, 3] = float("nan")
        statistics = step % 2 == 1
        want = train_step(models[0], optimizers[0], pieces, step, lr_of(step), 3.0, "float32", statistics)
        got = graphed(pieces, step, lr_of(step), statistics)
        assert bool(got.bad) == bool(want.bad) == (step == 8)
        if step != 8:
            close([got.loss, got.loss_pred, got.loss_cls, got.grad_norm], list(want[:4]))
        assert (got.statistics or {}).keys() == (want.statistics or {}).keys()
        close(list((got.statistics or {}).values()), list((want.statistics or {}).values()))
        close(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))
    assert len(kinds) == 2  # the long crops, with statistics and without
    assert any(not torch.equal(a, b) for a, b in zip(models[1].parameters(), Matpac(config).parameters(), strict=True))


def test_what_a_graph_would_freeze_is_noticed(model_config):
    """The stand-in can fail: a step whose rate is a number goes on at the rate it was recorded with."""
    model = Matpac(model_config).train()
    optimizer = make_optimizer(model, TrainConfig())
    train_step(model, optimizer, batch(model_config, 0), 0, 1e-3, 3.0)
    twin = copy.deepcopy(model)
    other = make_optimizer(twin, TrainConfig())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rate = 1e-3
    pieces = batch(model_config, 1)
    replay, _ = record(lambda: train_step(model, optimizer, pieces, 1, rate, 3.0))
    assert torch.equal(model.student.norm.weight, twin.student.norm.weight)  # recording has changed nothing
    rate = 1e-2
    replay()
    train_step(twin, other, pieces, 1, rate, 3.0)
    assert not torch.allclose(model.student.norm.weight, twin.student.norm.weight, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cuda_graphs_are_the_steps(config, precision):
    models = [Matpac(config).cuda().train(), Matpac(config).cuda().train()]
    optimizers = [make_optimizer(model, TrainConfig()) for model in models]
    graphed = GraphedStep(models[1], optimizers[1], 3.0, precision)
    losses = []
    for step in range(STEPS):
        pieces = batch(config, step, "cuda")
        statistics = step % 2 == 1
        want = train_step(models[0], optimizers[0], pieces, step, lr_of(step), 3.0, precision, statistics)
        losses.append((float(graphed(pieces, step, lr_of(step), statistics).loss), float(want.loss)))
    assert len(graphed._graphs) >= 2
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-4 if precision == "float32" else 2e-2)


def test_graphs_need_one_process_on_a_gpu(tmp_path, corpus, model_config, train_config):
    with pytest.raises(ConfigError, match="cuda_graph is for one process on a GPU; this is 1 on cpu: leave it out"):
        pretrain(corpus, tmp_path / "run", model_config, dataclasses.replace(train_config, cuda_graph=True), "cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_a_run_on_graphs_is_the_run(tmp_path, corpus, model_config, train_config):
    """Captured while the feed pins and copies beside it, and gone on with after a stop."""
    plain, graphs = (dataclasses.replace(train_config, cuda_graph=on) for on in (False, None))
    pretrain(corpus, tmp_path / "plain", model_config, plain, "cuda")
    pretrain(corpus, tmp_path / "graphs", model_config, graphs, "cuda", stop=after(7))
    pretrain(corpus, tmp_path / "graphs", model_config, graphs, "cuda")
    curves = [[r for r in read_log(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("plain", "graphs")]
    assert len(curves[0]) == 6
    for plain, graph in zip(*curves, strict=True):
        for key in ("step", "loss", "grad_norm", "teacher_entropy"):
            assert graph[key] == pytest.approx(plain[key], rel=1e-3)


@pytest.mark.gpu
def test_a_replay_never_waits_for_the_device(model_config):
    model = Matpac(model_config).cuda().train()
    graphed = GraphedStep(model, make_optimizer(model, TrainConfig()), 3.0, "bf16")
    pieces = [batch(model_config, step, "cuda") for step in range(6)]
    try:
        for step in range(6):
            torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
            out = graphed(pieces[step], step, lr_of(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not out.bad


class Device:
    """A GPU of 100 bytes, of which others have some: what a step takes stays for the next that is not recorded; graphs
    share what they take. `earlier` is what this process has had, and still keeps unused."""

    def __init__(self, monkeypatch, used: dict[int, int], others: int = 0, earlier: int = 0):
        self.used, self.others, self.recording = used, others, False
        self.eager = self.peak = earlier
        self.graphs = 0
        monkeypatch.setattr(module, "train_step", self.train_step)
        free = lambda device: (100 - self.others - self.eager - self.graphs, 100)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.eager + self.graphs)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def empty_cache(self):
        self.eager = 0

    def reset(self, device):
        self.peak = self.eager + self.graphs

    def train_step(self, model, optimizer, pieces, *rest, **options):
        used = self.used[pieces[0][0].shape[2]]
        if self.recording:
            self.graphs = max(self.graphs, used)
        else:
            self.eager = max(self.eager, used)
        self.peak = max(self.peak, self.eager + self.graphs)
        assert self.peak + self.others <= 100, "out of memory"
        return train_step(model, optimizer, pieces, *rest, **options)

    def record(self, run):
        self.eager, self.recording = 0, True  # torch gives back what is free before it records
        try:
            return record(run)
        finally:
            self.recording = False


def lengths_recorded(graphed):
    return sorted(shapes[0][2] for shapes, *_ in graphed._graphs)


@pytest.mark.parametrize(("long", "recorded"), [(50, [16, 32]), (51, []), (99, [])])
@pytest.mark.parametrize("order", [(16, 32), (32, 16)])
def test_whether_graphs_fit_is_decided_by_the_longest_crop_whichever_comes_first(
    model_config, monkeypatch, long, recorded, order
):
    model, device = Matpac(model_config).train(), Device(monkeypatch, {16: 20, 32: long})
    graphed = GraphedStep(model, make_optimizer(model, TrainConfig()), 3.0, "float32", device.record, True, lengths=2)
    first, second = order
    for step, n_frames in enumerate([first] * 4 + [second] * 3 + [first] * 2):
        graphed(batch(model_config, step, n_frames=n_frames), step, lr_of(step))
        assert step >= 4 or not graphed._graphs
    assert lengths_recorded(graphed) == recorded


@pytest.mark.parametrize(("others", "recorded"), [(0, 2), (40, 2), (41, 0)])
def test_what_others_have_of_the_device_is_no_room(model_config, monkeypatch, others, recorded):
    model, device = Matpac(model_config).train(), Device(monkeypatch, {16: 30}, others)
    graphed = GraphedStep(model, make_optimizer(model, TrainConfig()), 3.0, "float32", device.record, True)
    for step in range(8):
        graphed(batch(model_config, step, n_frames=16), step, lr_of(step), statistics=step > 3)
    assert len(graphed._graphs) == recorded


def test_what_the_process_had_before_is_no_part_of_a_step(model_config, monkeypatch):
    """As by another run, or by the probe before the first step."""
    model, device = Matpac(model_config).train(), Device(monkeypatch, {16: 30}, earlier=90)
    graphed = GraphedStep(model, make_optimizer(model, TrainConfig()), 3.0, "float32", device.record, True)
    for step in range(4):
        graphed(batch(model_config, step, n_frames=16), step, lr_of(step))
    assert len(graphed._graphs) == 1


def test_graphs_are_captured_on_a_stream_of_their_own_device(monkeypatch):
    """Torch's own is that of whichever device came first."""
    used = []

    @contextlib.contextmanager
    def graph(cuda_graph, pool, stream, capture_error_mode):
        used.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    CudaRecorder(torch.device("cuda:1"))(lambda: None)  # pyright: ignore[reportArgumentType]
    assert used == ["stream of cuda:1"]


@pytest.mark.parametrize(("long", "recorded"), [(50, [16, 16, 32]), (51, [16, 16]), (80, [16, 16])])
def test_each_kind_is_recorded_only_where_its_own_graph_fits(model_config, monkeypatch, long, recorded):
    """Where it is not known which lengths will come; and what graphs have taken is not counted for steps."""
    model, device = Matpac(model_config).train(), Device(monkeypatch, {16: 20, 32: long})
    graphed = GraphedStep(model, make_optimizer(model, TrainConfig()), 3.0, "float32", device.record, True)
    kinds = [(16, False)] * 3 + [(16, True)] * 3 + [(32, False)] * 4
    for step, (n_frames, statistics) in enumerate(kinds):
        graphed(batch(model_config, step, n_frames=n_frames), step, lr_of(step), statistics)
    assert lengths_recorded(graphed) == recorded
