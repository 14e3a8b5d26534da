"""Checkpoints: official names both ways bit for bit, safety, strictness, damage."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch

from matpac_fast import checkpoint, load_encoder, pickles
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.model import Matpac, MatpacConfig
from matpac_fast.train.weights import weights_sizes

TINY = dict(n_frames=64, width=32, depth=2, num_heads=2, predictor_width=24, predictor_depth=1, predictor_heads=2)
TINY |= dict(head_hidden=40, head_bottleneck=16, prototypes=24)


@pytest.fixture(params=[0, 3])
def model(request) -> Matpac:
    return Matpac(MatpacConfig(mcl_heads=request.param, **TINY))


def test_official_names_there_and_back_bit_for_bit(model):
    official = model.official_state_dict()
    assert set(official["_ema"]) == set(model.teacher.state_dict())
    again = Matpac.from_official(official, num_heads=2, predictor_heads=2)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_golden_names_are_all_there(golden):
    weights = {name[2:]: value for name, value in golden("train_mcl").items() if name.startswith("w/")}
    exported = Matpac.from_official(weights, num_heads=2, predictor_heads=4).official_state_dict()
    flat = {}
    for name, value in exported.items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    assert set(flat) == set(weights)
    assert all(torch.equal(flat[name], weights[name]) for name in weights)


def test_own_format_there_and_back(model, tmp_path):
    model.center += 0.5
    model.save(tmp_path / "m.safetensors", step=7)
    again = Matpac.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert checkpoint.load(tmp_path / "m.safetensors")[1]["step"] == 7
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_safetensors_of_others_have_no_metadata(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    state, metadata = checkpoint.load(tmp_path / "m.safetensors")
    assert (state["w"].tolist(), metadata) == ([1, 1], {})


@pytest.mark.parametrize("config", [5, None, [1], {"width": "192"}, {"depht": 3}])
def test_a_configuration_that_cannot_be_is_damage(tmp_path, config):
    checkpoint.save(tmp_path / "m", {"w": torch.zeros(1)}, {"config": config})
    with pytest.raises(CheckpointError, match="m: damaged: its configuration cannot be: .*(expected|unknown fields)"):
        Matpac.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="m: damaged: its configuration"):
        weights_sizes(tmp_path / "m")


def test_a_fairseq_checkpoint_file_loads(model, tmp_path):
    torch.save({"args": None, "cfg": {"lr": [1]}, "model": model.official_state_dict()}, tmp_path / "c.pt")
    again = Matpac.from_official(tmp_path / "c.pt", num_heads=2, predictor_heads=2, max_steps=5)
    assert again.config.max_steps == 5
    assert torch.equal(again.teacher.norm.bias, model.teacher.norm.bias)


def test_an_official_file_of_another_predictor_needs_its_heads(tmp_path):
    """Read with the official 16 a preset's own predictor would be another one, of the same shapes."""
    preset = MatpacConfig.preset("nano", depth=1, predictor_depth=1)
    official = Matpac(preset).official_state_dict()
    torch.save({"model": official}, tmp_path / "c.pt")
    for take in (lambda: Matpac.from_official(official), lambda: weights_sizes(tmp_path / "c.pt")):
        with pytest.raises(CheckpointError, match=r"128 has.*give predictor_heads; .* have 4 .*predictor_heads=4"):
            take()
    assert Matpac.from_official(official, predictor_heads=4).config.predictor_heads == 4
    assert weights_sizes(tmp_path / "c.pt", {"predictor_heads": 4})["predictor_heads"] == 4
    whole = Matpac(MatpacConfig.preset("nano", depth=1, predictor_depth=1, predictor_width=512, predictor_heads=16))
    assert Matpac.from_official(whole.official_state_dict()).config.predictor_heads == 16


def test_a_fairseq_checkpoint_loads_for_another_length_of_crop(model):
    official = model.official_state_dict()
    longer = Matpac.from_official(official, num_heads=2, predictor_heads=2, n_frames=96)
    want = Matpac(model.config.replace(n_frames=96))
    assert longer.config == want.config
    for name, tensor in longer.state_dict().items():
        source = want if name in checkpoint.POSITIONS else model
        assert torch.equal(tensor, source.state_dict()[name]), name
    with pytest.raises(CheckpointError, match=r"2 of another shape: frontend\.pos_embed"):
        Matpac.from_official(official, num_heads=2, predictor_heads=2, n_frames=96, n_mels=128)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # is for files that their users trust, not for these
    torch.save({"model": {"w": torch.zeros(1)}, "bomb": Bomb()}, "bomb.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="posix.mkdir, and loading it could run code, so it is refused"):
        checkpoint.load("bomb.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_gpu_has_saved_is_read_onto_the_cpu(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"w": torch.arange(2)}, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    found = checkpoint.load(tmp_path / "c.pt")[0]["w"]
    assert (found.device.type, found.tolist()) == ("cpu", [0, 1])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_what_lies_beside_the_weights_is_skipped(tmp_path, zipped, core):
    """No object of numpy is built: a live array whose dtype a pickle changes is a write outside its memory."""
    kinds = [np.dtype(kind) for kind in ("?", "f8", ">f4", "S8", "U3", "M8[s]", "O")] + [np.dtype([("x", "i4")])]
    beside = [
        *kinds,
        np.float64(3),
        np.bool_(True),
        np.str_("a"),
        np.arange(3.0),
        np.ones(2, order="F"),
        np.array(None),
    ]
    beside.append(argparse.Namespace(lr=[1], inner=argparse.Namespace()))
    content = {"model": {"w": torch.arange(2)}, "beside": beside}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    if not zipped:  # the name that the other numpy writes
        whole = (tmp_path / "c.pt").read_bytes()
        (tmp_path / "c.pt").write_bytes(whole.replace(b"numpy._core.", b"numpy." + core + b"."))
    assert checkpoint.load(tmp_path / "c.pt")[0]["w"].tolist() == [0, 1]
    found = pickles.unpickle(tmp_path / "c.pt")["beside"]
    assert len(found) == len(beside)
    assert {type(value).__name__ for value in found} == {"_Skipped"}


def test_threads_load_and_what_the_application_allows_stays(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "acc": np.arange(3.0)}, tmp_path / "c.pt")
    core = np._core if hasattr(np, "_core") else np.core  # of numpy 1
    own = [np.dtype, core.multiarray._reconstruct, argparse.Namespace, dataclasses.Field]
    with torch.serialization.safe_globals(own):  # half of numpy's: none may be mixed with what is skipped
        before = set(torch.serialization.get_safe_globals())
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                for found in pool.map(lambda _: checkpoint.load(tmp_path / "c.pt"), range(60)):
                    assert list(found[0]) == ["w"]
        finally:
            sys.setswitchinterval(interval)
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a safetensors file nor a torch checkpoint"),
        (b"<html>not found</html>", "neither a safetensors file nor a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS.s pointer .* git lfs pull"),
        (b"PK\x03\x04 and then rubbish", "damaged torch checkpoint"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", "damaged safetensors file"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.pt: {message}"):
        checkpoint.load(path)


def test_compiled_blocks_are_saved_by_their_own_names(model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = load_encoder("matpac-nano", "cpu")
    for module in (model, encoder):
        module.student.blocks[1] = torch.compile(module.student.blocks[1])
        module.save(tmp_path / type(module).__name__)
    for again in (Matpac.load(tmp_path / "Matpac"), Matpac.from_official(model.official_state_dict(), 2, 2)):
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert load_encoder(tmp_path / "Encoder", "cpu").id == load_encoder("matpac-nano", "cpu").id


def test_layers_that_no_file_can_hold_are_named_before_one_is_written(model, tmp_path):
    torch.nn.utils.parametrizations.spectral_norm(model.student.blocks[0].mlp.fc1)
    says = r"^save: put back the layers .* 1 missing: student\.blocks\.0\.mlp\.fc1\.weight; 3 unexpected: "
    for save in (lambda: model.save(tmp_path / "m"), model.official_state_dict):
        with pytest.raises(CheckpointError, match=says):
            save()
    assert list(tmp_path.iterdir()) == []


def test_what_fsdp_has_cut_is_gathered_first(model, tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        for save in (lambda: model.save(tmp_path / "m"), model.official_state_dict):
            with pytest.raises(CheckpointError, match="FSDP has cut the weights: gather them on every rank by"):
                save()
        own = Matpac(model.config)
        own.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        own.save(tmp_path / "m")
    finally:
        torch.distributed.destroy_process_group()


def test_what_joins_the_metadata_may_be_numpys_and_torchs_numbers(model, tmp_path):
    model.save(tmp_path / "m", step=torch.tensor(3), lr=np.float32(0.5), by={"seed": np.int64(2)})
    assert checkpoint.load(tmp_path / "m")[1].items() >= {"step": 3, "lr": 0.5, "by": {"seed": 2}}.items()
    with pytest.raises(ConfigError, match=r"tensor\(\[1\., 1\.\]\) is a Tensor; expected numbers and texts"):
        model.save(tmp_path / "other", step=torch.ones(2))
    assert not (tmp_path / "other").exists()


def test_a_truncated_file_is_named(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        checkpoint.load(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "none.safetensors")


def test_what_does_not_fit_is_listed(model):
    official = model.official_state_dict()
    del official["student_encoder.norm.bias"]
    official["student_encoder.norm.extra"] = torch.zeros(3)
    official["decoder.decoder_norm.weight"] = torch.zeros(25)
    with pytest.raises(CheckpointError) as caught:
        Matpac.from_official(official, num_heads=2, predictor_heads=2)
    message = str(caught.value)
    assert "1 missing: student.norm.bias" in message
    assert "1 unexpected: student.norm.extra" in message
    assert "1 of another shape: predictor.norm.weight (25,) for (24,)" in message


def test_what_is_not_official_is_named(model, tmp_path):
    path, official = tmp_path / "theirs.pt", model.official_state_dict()
    for odd, message in (
        ({"extra": torch.zeros(3)}, "1 unknown names: extra"),
        ({"_ema": official["_ema"] | {"n": 7}}, "1 of its names hold no tensor: _ema.n"),
    ):
        torch.save(official | odd, path)
        for load in (Matpac.from_official, load_encoder):
            with pytest.raises(CheckpointError, match=f"theirs.pt: not an official MATPAC checkpoint: {message}"):
                load(path)


def test_heads_follow_the_official_rule_or_are_given():
    assert checkpoint.heads_by_rule(768, None) == 12
    assert checkpoint.heads_by_rule(96, 4) == 4
    with pytest.raises(CheckpointError, match="a width of 96 does not divide into heads of 64 channels"):
        checkpoint.heads_by_rule(96, None)


def test_sizes_are_read_from_content(model):
    ours = checkpoint.from_official_names(model.official_state_dict())
    sizes = checkpoint.read_sizes(ours)
    assert all(getattr(model.config, name) == value for name, value in sizes.items())
    assert {"n_mels", "n_frames", "mcl_heads", "prototypes", "predictor_depth"} <= set(sizes)


@pytest.mark.parametrize(
    ("n_mels", "n_frames", "patch_size"), [(64, 96, 16), (128, 160, 16), (40, 32, 8), (80, 608, 16), (16, 160, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_grid_is_read_off_the_positions(n_mels, n_frames, patch_size, dtype):
    """The official training code takes any number of mels, and by the number of tokens 8 x 10 patches may be 5 x 16."""
    made = Matpac(MatpacConfig(**TINY | dict(n_mels=n_mels, n_frames=n_frames, patch_size=patch_size)))
    official = made.to(dtype).official_state_dict()
    assert Matpac.from_official(official, num_heads=2, predictor_heads=2).config == made.config


def test_the_applications_default_device_changes_no_sizes(model):
    ours = checkpoint.from_official_names(model.official_state_dict())
    want = checkpoint.read_sizes(ours)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        assert checkpoint.read_sizes(ours) == want


def test_positions_that_are_no_sines_are_of_80_mels(model):
    ours = checkpoint.from_official_names(model.official_state_dict())
    pos = ours["frontend.pos_embed"]
    whole_numbers = torch.zeros(pos.shape, dtype=torch.int64)
    for other in (torch.randn(pos.shape), torch.zeros(1, 1, 32).expand(pos.shape), pos.flip(1), whole_numbers):
        sizes = checkpoint.read_sizes(ours | {"frontend.pos_embed": other})
        assert (sizes["n_mels"], sizes["n_frames"]) == (80, 64)
    endless = torch.zeros(1).expand(1, 1 + 5 * 2**38, 32)  # as a few bytes of a pickle may have it
    assert checkpoint.read_sizes(ours | {"frontend.pos_embed": endless})["n_frames"] == 2**42
    for n, other in ((23, torch.randn(1, 24, 32)), (19, pos[:, :-1])):
        with pytest.raises(CheckpointError, match=f"a.pt: its {n} positions are no grid of patches of 16 on 80 mels"):
            checkpoint.read_sizes(ours | {"frontend.pos_embed": other}, "a.pt")


def test_names_of_blocks_may_say_any_number(model):
    ours = checkpoint.from_official_names(model.official_state_dict())
    far = {name.replace("blocks.1.", "blocks.99999999."): tensor for name, tensor in ours.items()}
    assert checkpoint.read_sizes(far)["depth"] == 2
    with pytest.raises(CheckpointError, match="have not MATPAC's axes"):
        checkpoint.read_sizes(ours | {"frontend.patch_embed.proj.weight": torch.zeros(3)})


def test_any_damage_is_named(tmp_path):
    content, path, chance = {"model": {"w": torch.zeros(20)}, "cfg": {"a": 1}}, tmp_path / "c.pt", random.Random(0)
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(chance.choice((1, 2, 4))):
                damaged[chance.randrange(2, min(len(whole), 700))] = chance.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):  # what still is a dictionary of tensors may be read
                assert all(isinstance(name, str) for name in checkpoint.load(path)[0])


@pytest.mark.parametrize("metadata", ["[]", '"x"', "3", "[" * 100_000, "9" * 5000])
def test_metadata_that_is_none_is_damage(tmp_path, metadata):
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "m", {"matpac_fast": metadata})
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        checkpoint.load(tmp_path / "m")


def test_a_failed_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    # Also where, which a failing write does not say by itself.
    with pytest.raises(OSError, match="No space left on device: .*m.safetensors"):
        model.save(tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_a_name_that_safetensors_does_not_read_is_said_as_such(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.safetensors")
    checkpoint.save(path, {"w": torch.zeros(1)}, {})
    with pytest.raises(ConfigError, match="a name is not UTF-8; rename it"):
        checkpoint.load(path)
    os.rename(path, tmp_path / "\xe9.safetensors")
    assert checkpoint.load(tmp_path / "\xe9.safetensors")[0]["w"].tolist() == [0]


def test_without_latest_a_copy_that_somebody_made_is_not_the_newest(tmp_path):
    for name in ("step-00000004", "step-00000008", "step-00000008-best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.read_latest(tmp_path) == "step-00000008"
    (tmp_path / "latest").write_text("step-00000004\n")
    assert checkpoint.read_latest(tmp_path) == "step-00000004"
