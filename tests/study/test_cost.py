"""What embeddings cost: counted, measured in a fresh process, and kept."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from matpac_fast import encoder as encoder_module
from matpac_fast import load_encoder, register_encoder
from matpac_fast.errors import ConfigError
from matpac_fast.study import cost, sweep
from matpac_fast.study.cost import count_macs, measure, measure_here
from matpac_fast.study.results import add_cost, read_costs, write_table
from matpac_fast.study.sweep import StudyConfig
from tests.study.conftest import made_cost


def test_multiply_adds_are_counted_right(encoder_file):
    encoder = load_encoder(encoder_file, "cpu")
    n = encoder.log_mel_config.n_samples(64)  # 5 x 4 patches and CLS
    tokens, width = 21, 16
    block = tokens * width * width * (4 + 2 * 4) + 2 * tokens * tokens * width
    found = count_macs(encoder, torch.zeros(1, n))
    assert found in (block, block + (tokens - 1) * 256 * width)  # the patch embedding may be a fused operator
    assert count_macs(encoder, torch.zeros(3, n)) == 3 * found


def test_cost_in_a_fresh_process(encoder_file, tmp_path):
    small = measure(str(encoder_file), 0.6, 1, "cpu", threads=1)
    large = measure(str(encoder_file), 0.6, 256, "cpu", threads=1)
    encoder = load_encoder(encoder_file, "cpu")
    numbers = sum(t.numel() for t in (*encoder.parameters(), *encoder.buffers()))  # of four bytes each
    assert small.weights_mib == large.weights_mib == pytest.approx(numbers * 4 / 2**20)
    assert small.weights_mib <= small.peak_mib < large.peak_mib
    assert large.peak_mib > 256 * 0.6 * 16_000 * 4 / 2**20 / 4  # of the waves alone a quarter: they are made before
    assert small.macs == large.macs > 0
    assert small.batch_ms_low <= small.batch_ms <= small.batch_ms_high
    assert small.encoder_id == encoder.id
    for one in (small, large):
        add_cost(tmp_path / "cost.parquet", one)
    assert read_costs(tmp_path / "cost.parquet") == [small, large]
    with pytest.raises(ConfigError, match="in a process of its own: .*no encoder"):
        measure("nobody", 0.6, 1, "cpu")


def test_a_table_that_is_not_of_costs_is_named_with_what_to_do(tmp_path):
    write_table(tmp_path / "cost.parquet", [{"encoder": "e", "score": 1.0}])
    with pytest.raises(ConfigError, match=r"cost.parquet: damaged \(.*'score'.*\): remove it and run the same again"):
        read_costs(tmp_path / "cost.parquet")


@pytest.mark.parametrize("status", [None, "Name: python"])
def test_a_system_that_does_not_tell_its_memory_is_told_how_to_go_on(encoder_file, monkeypatch, status):
    def read_text(path, **options):
        if status is None:
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(cost.Path, "read_text", read_text)
    with pytest.raises(ConfigError, match="no VmHWM: memory is measured on Linux only; use --no-cost"):
        measure_here(load_encoder(encoder_file, "cpu"), "it", 0.6, 1)


def test_the_cost_of_what_only_this_process_knows_says_what_to_do(monkeypatch):
    monkeypatch.setattr(encoder_module, "_registry", dict(encoder_module._registry))
    register_encoder("mine", "no_such_module:load")
    with pytest.raises(ConfigError, match="no encoder 'mine'.*names it in one process alone: leave costs out"):
        measure("mine", 0.6, 1, "cpu")


def test_what_an_encoder_prints_beside_its_cost_is_no_part_of_it(encoder_file, monkeypatch, capsys):
    def run(command, **options):
        cost.main(command[3:])
        return subprocess.CompletedProcess(command, 0, f"hello{capsys.readouterr().out}bye\n", "")

    monkeypatch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
    monkeypatch.setattr(subprocess, "run", run)
    found = measure(str(encoder_file), 0.6, 1, "cpu", threads=torch.get_num_threads())
    assert found.encoder_id == load_encoder(encoder_file, "cpu").id


def test_costs_that_are_known_are_not_measured_again(encoder_file, tmp_path, monkeypatch):
    asked = []

    def here(name, ts, batch, device, dtype, threads):
        asked.append((ts, batch))
        return measure_here(load_encoder(name, device), name, ts, batch)

    monkeypatch.setattr(sweep, "measure", here)
    monkeypatch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
    study = StudyConfig((str(encoder_file),), (), (0.2, 0.5), batch_sizes=(1, 2))
    found = sweep.cost_sweep(study, tmp_path, lambda *_: None)
    assert asked == [(0.2, 1), (0.2, 2), (0.5, 1), (0.5, 2)]
    more = sweep.cost_sweep(dataclasses.replace(study, temporal_supports=(0.2, 0.5, 0.6)), tmp_path, lambda *_: None)
    assert asked[4:] == [(0.6, 1), (0.6, 2)]
    assert all(more[key] == cost for key, cost in found.items())


def test_known_costs_go_by_the_name_that_is_asked_for(encoder_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda name, ts, batch, *_: measure_here(load_encoder(name), name, ts, batch))
    monkeypatch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
    names = (str(encoder_file), str(shutil.copy(encoder_file, tmp_path / "moved.safetensors")))
    for some in (names[:1], names):
        found = sweep.cost_sweep(StudyConfig(some, (), (0.2,), batch_sizes=(1,)), tmp_path, lambda *_: None)
        assert {key: cost.encoder for key, cost in found.items()} == {(name, 0.2, 1): name for name in some}
    assert len(read_costs(tmp_path / "cost.parquet")) == 1


def test_costs_of_an_encoder_that_has_float32_alone_are_known_again(tmp_path, monkeypatch):
    study = StudyConfig(("logmel-stats",), (), (0.2,), batch_sizes=(1,), dtype="bfloat16")
    monkeypatch.setattr("matpac_fast.study.cost._SECONDS", 0.0)
    monkeypatch.setattr(sweep, "measure", lambda name, ts, batch, *_: measure_here(load_encoder(name), name, ts, batch))
    first = sweep.cost_sweep(study, tmp_path, lambda *_: None)
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured again"))
    assert sweep.cost_sweep(study, tmp_path, lambda *_: None) == first


def test_studies_in_one_folder_keep_each_others_costs(encoder_file, tmp_path, monkeypatch):
    other = dataclasses.replace(made_cost(0.5), encoder_id="another study's")

    def here(name, ts, batch, device, *_):
        add_cost(tmp_path / "cost.parquet", other)  # while this one measures
        return dataclasses.replace(made_cost(ts), encoder_id="this study's")

    monkeypatch.setattr(sweep, "measure", here)
    sweep.cost_sweep(StudyConfig((str(encoder_file),), (), (0.2,), batch_sizes=(4,)), tmp_path, lambda *_: None)
    assert [cost.encoder_id for cost in read_costs(tmp_path / "cost.parquet")] == ["another study's", "this study's"]


def test_costs_that_are_added_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_cost(tmp_path / "cost.parquet", made_cost(float(i))), range(8)))
    assert sorted(cost.temporal_support for cost in read_costs(tmp_path / "cost.parquet")) == list(range(8))


def test_an_encoder_whose_code_changes_is_measured_again(tmp_path, monkeypatch):
    text = """import matpac_fast as mf
class Peak(mf.AudioEncoder):
    embedding_dim, settings = 1, {"kind": "peak"}
    def forward_pieces(self, pieces, pool, layers):
        return pieces.amax(1)[:, None, None]
"""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sweep, "measure", lambda *_: measure_here(peak, "peak", 0.2, 1))
    monkeypatch.setattr(sweep, "load_encoder", lambda *_, **__: peak)
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    for module in (sweep, cost):
        monkeypatch.setattr(module, "class_name", lambda _: "Peak")  # of one module that is edited
    study, codes = StudyConfig(("peak",), (), (0.2,), batch_sizes=(1,)), []
    for name, source in (("one", text), ("same", text), ("other", text.replace("amax", "amin"))):
        (tmp_path / f"costed_{name}.py").write_text(source)
        peak = importlib.import_module(f"costed_{name}").Peak()
        sweep.cost_sweep(study, tmp_path, lambda *_: None)
        codes.append([each.code for each in read_costs(tmp_path / "cost.parquet")])
    assert codes[0] == codes[1] == codes[2][:1] != [""]
    assert len(set(codes[2])) == 2


def test_costs_of_before_code_was_kept_are_read_and_measured_again(encoder_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda name, ts, batch, *_: measure_here(load_encoder(name), name, ts, batch))
    monkeypatch.setattr(cost, "_SECONDS", 0.0)
    study, path = StudyConfig((str(encoder_file),), (), (0.2,), batch_sizes=(1,)), tmp_path / "cost.parquet"
    sweep.cost_sweep(study, tmp_path, lambda *_: None)
    (row,) = [dataclasses.asdict(each) for each in read_costs(path)]
    assert row["encoder_class"] == "matpac_fast.vit_encoder.Encoder"
    write_table(path, [{key: value for key, value in row.items() if key not in ("encoder_class", "code")}])
    assert [(each.encoder_class, each.code) for each in read_costs(path)] == [("", "")]
    for _ in range(2):
        sweep.cost_sweep(study, tmp_path, lambda *_: None)
        assert [each.encoder_class for each in read_costs(path)] == ["", row["encoder_class"]]
