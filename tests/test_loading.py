"""What `load_encoder` reads besides MATPAC's own files: M2D, other packages' encoders; ids, precision, compilation."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import AudioEncoder, checkpoint, get_matpac, list_encoders, load_encoder, reference
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.export import Exportable
from matpac_fast.vit_encoder import Encoder, encoder_of
from matpac_fast.zoo import beats, cnn14

SECOND = 16_000


def make(**front_end: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=64, depth=2, num_heads=1, **front_end)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 10


def m2d_state(encoder: Encoder) -> dict[str, Tensor]:
    """Weights under the names that M2D's files have, with parts that are no encoder's."""
    state = {
        name.removeprefix("frontend.").removeprefix("student."): tensor for name, tensor in encoder.state_dict().items()
    }
    state |= {"mask_token": torch.zeros(1, 1, 64), "decoder_blocks.0.norm1.weight": torch.ones(32)}
    return state | {"target_blocks.0.norm1.weight": torch.ones(64)}


@pytest.mark.parametrize(
    "front_end", [dict(preemphasis=0.97), dict(preemphasis=0.97, framing="kaldi", n_fft=512), dict(log_floor=1e-5)]
)
def test_any_log_mel_embeds_as_it_computes(front_end):
    encoder, config = make(**front_end), reference.LogMelConfig(**front_end)
    least = 512 if "framing" in front_end else 401 if "preemphasis" in front_end else 400
    wave = noise(8_000)
    for samples, windows in ((8_000, None), (400, None), (8_000, 0.3)):
        found = encoder.embed(wave[:samples], SECOND, temporal_support=windows, hop=windows and 0.1)
        for start, end, value in zip(found.start.tolist(), found.end.tolist(), found.values, strict=True):
            cut = wave[round(SECOND * start) : min(samples, round(SECOND * end))]
            spec = reference.log_mel(F.pad(cut, (0, max(0, least - len(cut))))[None], config)
            tokens = encoder.student(encoder.frontend(F.pad(spec, (0, -spec.shape[-1] % 16))))[:, 1:]
            want = tokens.unflatten(1, (5, -1)).transpose(1, 2).flatten(2).mean(1)[0]
            torch.testing.assert_close(value, want, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="export: the encoder's log-mel has Kaldi's framing, pre-emphasis or a floor"):
        Exportable(encoder)


@pytest.mark.parametrize("prefix", ["", "module.ar.runtime.backbone."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("stats", [None, (-6.5, 3.9)])
def test_m2d_encoders_load_by_content(tmp_path, prefix, nested, stats):
    source = make()
    state = {prefix + name: tensor for name, tensor in m2d_state(source).items()}
    state |= {"module.head.mlp.mlp.0.weight": torch.zeros(527, 64)} if prefix else {}
    state |= {"norm_stats": torch.tensor(stats)} if stats else {}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "epoch": 300} if nested else state, path)
    encoder = load_encoder(path, "cpu")

    # What the official M2D computes: centred frames, its own statistics, whole patches, the mean over time.
    wave = noise(2, 9_000)
    mean, std = stats or (-7.1, 4.2)
    config = reference.LogMelConfig(mean=mean, std=std)
    spec = reference.log_mel(F.pad(wave, (200, 200), mode="reflect"), config)
    assert spec.shape[-1] == 9_000 // 160 + 1
    tokens = source.student(source.frontend(F.pad(spec, (0, -spec.shape[-1] % 16))))[:, 1:]
    want = tokens.unflatten(1, (5, -1)).transpose(1, 2).flatten(2).mean(1)
    torch.testing.assert_close(encoder.embed(wave, SECOND).values[:, 0], want, rtol=0, atol=1e-5)
    emb, layers = get_matpac(path, device="cpu")(wave)
    torch.testing.assert_close(emb, want, rtol=0, atol=1e-5)
    assert layers.shape == (2, 2, 320)

    # Frames at a window's edge are mirrored, so windows have log-mels of their own.
    cut = encoder.embed(wave[0], SECOND, temporal_support=0.2)
    alone = [encoder.embed(part, SECOND).values for part in wave[0].split(3_200)]
    torch.testing.assert_close(cut.values, torch.cat(alone), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="give temporal_support"):
        encoder.stream(SECOND)

    encoder.save(tmp_path / "ours.safetensors")
    again = load_encoder(tmp_path / "ours.safetensors", "cpu")
    assert again.id == encoder.id != source.id
    assert torch.equal(again.embed(wave, SECOND).values, encoder.embed(wave, SECOND).values)


def test_m2d_that_cannot_be_read_is_refused(tmp_path):
    state = m2d_state(make())
    torch.save({**state, "patch_embed.proj.weight": torch.zeros(64, 1, 16, 4)}, tmp_path / "narrow.pth")
    with pytest.raises(CheckpointError, match="patches of 16 x 4; only square ones"):
        load_encoder(tmp_path / "narrow.pth")
    folder = tmp_path / "m2d_vit_base-80x608p16x16p32k-240413"
    folder.mkdir()
    torch.save(state, folder / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="M2D at 32 kHz, by the name of its folder"):
        load_encoder(folder / "checkpoint.pth")


def test_an_altered_file_is_told_by_its_id(tmp_path):
    encoder = make()
    encoder.save(tmp_path / "e.safetensors")
    state, metadata = checkpoint.load(tmp_path / "e.safetensors")
    assert metadata["id"] == encoder.id
    state["student.norm.weight"][0] += 1e-6
    checkpoint.save(tmp_path / "e.safetensors", state, metadata)
    with pytest.raises(CheckpointError, match=f"altered or damaged: .*{encoder.id[:12]}"):
        load_encoder(tmp_path / "e.safetensors")


class Constant(AudioEncoder):
    name, embedding_dim, settings = "constant", 3, {"kind": "constant"}

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return pieces.new_ones(len(pieces), 1, 3)


def load_constant(argument: str, device: torch.device, dtype: torch.dtype) -> AudioEncoder:
    encoder = Constant()
    encoder.name = f"constant of {argument or 'nothing'} on {device} in {dtype}"
    return encoder


def test_other_packages_register_encoders(monkeypatch, tmp_path):
    group = "matpac_fast.encoders"
    entries = [
        importlib.metadata.EntryPoint("constant", f"{__name__}:load_constant", group),
        importlib.metadata.EntryPoint("broken", "a_package_that_is_not_there:load", group),
        importlib.metadata.EntryPoint("liar", "builtins:dict", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", _load)
    assert list_encoders()[-3:] == ["broken", "constant", "liar"]
    assert list_encoders("con*") == ["constant"]
    encoder = load_encoder("constant:/w/weights.pt", "cpu", dtype="bfloat16")
    assert encoder.name == "constant of /w/weights.pt on cpu in torch.bfloat16"
    assert encoder.embed(noise(8), SECOND).values.tolist() == [[1.0, 1.0, 1.0]]
    assert not encoder.training  # though load_constant does nothing for it
    with pytest.raises(ConfigError, match="is a Constant; expected a MATPAC encoder"):
        get_matpac("constant")
    with pytest.raises(CheckpointError, match="encoder 'broken': a_package_that_is_not_there:load does not load"):
        load_encoder("broken")
    # A name comes before what lies in the working directory, but for what can only be a path.
    monkeypatch.chdir(tmp_path)
    make().save("constant")
    for folder in ("matpac-nano", "untrained-nano", "random-init"):
        os.mkdir(folder)
        assert load_encoder(folder, "cpu").embedding_dim == 960
    assert isinstance(load_encoder("constant", "cpu"), Constant)
    assert load_encoder().name == "matpac-nano"
    for path in ("./constant", tmp_path / "constant", Path("constant")):
        assert load_encoder(path, "cpu").name == "constant"
        assert isinstance(load_encoder(path, "cpu"), Encoder)


def _load(entry: importlib.metadata.EntryPoint) -> object:
    if entry.name == "constant":
        return load_constant  # this module may be known under another name
    return importlib.import_module(entry.module)


def test_bfloat16_is_near_and_cannot_be_saved(tmp_path):
    encoder = make()
    encoder.save(tmp_path / "e.safetensors")
    wave = noise(3, 20_000)
    want = encoder.embed(wave, SECOND, layers="all").values
    low = load_encoder(tmp_path / "e.safetensors", "cpu", dtype="bfloat16")
    got = low.embed(wave, SECOND, layers="all").values
    assert got.dtype == torch.float32
    error = (got - want).abs().max() / want.std()
    assert 1e-4 < error < 0.1
    assert low.student.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert low.student.norm.weight.dtype == torch.float32
    assert low.id != encoder.id
    with pytest.raises(ConfigError, match=r"rounded to torch\.bfloat16; load the encoder in float32"):
        low.save(tmp_path / "low.safetensors")
    with pytest.raises(ConfigError, match="dtype is 'float16'; expected 'float32' or 'bfloat16'"):
        load_encoder(tmp_path / "e.safetensors", dtype="float16")


def test_compiled_encoders_give_the_same(monkeypatch, tmp_path):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: whole(f, backend="eager", fullgraph=True))
    encoder = make()
    encoder.save(tmp_path / "e.safetensors")
    compiled = load_encoder(tmp_path / "e.safetensors", "cpu", compile=True)
    for clips, options in ((noise(3, 20_000), {}), (noise(1, 9_000), {"pool": "none", "layers": "all"})):
        want = encoder.embed(clips, SECOND, **options).values
        torch.testing.assert_close(compiled.embed(clips, SECOND, **options).values, want, rtol=0, atol=1e-5)
    assert compiled._compiled is not None


def test_copies_of_a_compiled_encoder_have_weights_of_their_own(monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: whole(f, backend="eager"))
    encoder, wave = make().prepare(compile=True), noise(1, 9_000)
    want = encoder.embed(wave, SECOND).values
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin.embed(wave, SECOND).values, want)
        assert twin._compiled is not None
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin.embed(wave, SECOND).values.any()
    assert torch.equal(encoder.embed(wave, SECOND).values, want)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_loading_and_saving_depend_on_no_default_and_draw_no_random_numbers(tmp_path, default):
    source = make()
    source.save(tmp_path / "e.safetensors")
    ids, random = [load_encoder("untrained-nano", "cpu").id, source.id], torch.get_rng_state()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            untrained = load_encoder("untrained-nano", "cpu")
        loaded = load_encoder(tmp_path / "e.safetensors", "cpu")
        loaded.save(tmp_path / "again.safetensors", "float16")
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert [untrained.id, loaded.id] == ids
    assert torch.equal(torch.get_rng_state(), random)
    half = load_encoder(tmp_path / "again.safetensors", "cpu")
    assert {t.dtype for e in (loaded, untrained, half) for t in e.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["matpac-nano", "untrained-nano", "cnn14", "beats"])
def test_loading_and_other_threads_leave_each_other_alone(monkeypatch, name):
    """Random numbers drawn meanwhile are not in the weights and do not come twice; the default dtype stays as it is."""
    monkeypatch.setattr(cnn14, "Cnn14", functools.partial(cnn14.Cnn14, (8,) * 6))
    monkeypatch.setattr(beats, "Beats", functools.partial(beats.Beats, 8, 48, 8, 1))
    want, drawn, reset = load_encoder(name, "cpu").id, [], torch.nn.Conv2d.reset_parameters

    def beside(layer):
        drawn.append(pool.submit(torch.rand, 4).result())
        reset(layer)

    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", beside)
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as pool:
            found = [load_encoder(name, "cpu").id for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [want, want]
    assert {numbers.dtype for numbers in drawn} == {torch.float64}
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn) > 1


def test_weights_are_copies_and_whole():
    source = make()
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    encoder = encoder_of(state, source.sizes, "student", "it")
    for tensor in state.values():
        tensor.zero_()
    assert encoder.id == source.id
    # A few bytes that a pickle lets stand for many.
    state["student.blocks.0.mlp.fc1.weight"] = torch.zeros(1).expand(256, 64)
    with pytest.raises(CheckpointError, match=r"damaged: it holds not all numbers of student\.blocks\.0\.mlp\.fc1"):
        encoder_of(state, source.sizes, "student", "it")
    with pytest.raises(CheckpointError, match="1000000000 blocks by its sizes, and only 30 tensors"):
        encoder_of(source.state_dict(), source.sizes | {"depth": 10**9}, "student", "it")


@pytest.mark.skipif(os.name != "posix", reason="paths of POSIX")
def test_unknown_names_say_where_files_are():
    with pytest.raises(
        CheckpointError, match=r"give the path or the https:// address .* https://github.com/aurianworld/matpac"
    ):
        load_encoder("matpac_10_2048.pt")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"sizes": {}}, "its sizes lack 'n_mels'"),
        ({"sizes": [1]}, "its sizes cannot be"),
        ({"sizes": None}, "its sizes cannot be"),
        ({"sizes": {"patch_size": 0}}, "its sizes cannot be: patch_size is 0"),
        ({"sizes": {"num_heads": 5}}, "its sizes cannot be: num_heads is 5"),
        ({"sizes": {"depth": "2"}}, "its sizes cannot be"),
        ({"sizes": {"n_frames": 10**400}}, "its sizes cannot be"),
        ({"sizes": {"depth": 2.5}}, "its sizes cannot be: depth is 2.5; expected a whole number"),
        ({"sizes": {"mean": "a"}}, "its sizes cannot be: log-mel: mean is 'a'; expected a number"),
        ({"sizes": {"mean": True}}, "mean is True; expected a number"),
        ({"sizes": {"hop": 160.5}}, "hop is 160.5; expected a whole number"),
        ({"sizes": {"sample_rate": 16000.5}}, "sample_rate is 16000.5; expected a whole number"),
        ({"sizes": {"gain": "x"}}, "gain is 'x'; expected a number"),
        ({"sizes": {"log_offset": None}}, "log_offset is None; expected a number"),
        ({"sizes": {"evil": 1}}, "its sizes cannot be: .*evil"),
        ({"sizes": {"depth": 10**9}}, "1000000000 blocks by its sizes"),
        ({"config": {"width": "a"}}, "its sizes cannot be"),
        ({"config": []}, "its sizes cannot be: .* expected its fields by name"),
        ({"config": 5}, "its sizes cannot be: .* expected its fields by name"),
    ],
)
def test_sizes_that_cannot_be_are_damage(tmp_path, metadata, says):
    source = make()
    if isinstance(metadata.get("sizes"), dict) and metadata["sizes"]:
        metadata = {"sizes": source.sizes | metadata["sizes"]}
    checkpoint.save(tmp_path / "e.safetensors", source.state_dict(), metadata)
    with pytest.raises(CheckpointError, match=rf"e\.safetensors: .*{says}" if "blocks" in says else says):
        load_encoder(tmp_path / "e.safetensors", "cpu")


def test_a_tensor_that_no_encoder_has_is_named(tmp_path):
    source = make()
    metadata = {"sizes": source.sizes}
    checkpoint.save(tmp_path / "e.safetensors", source.state_dict() | {"extra": torch.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match=r"e\.safetensors: altered: it has a tensor 'extra', and no encoder has"):
        load_encoder(tmp_path / "e.safetensors", "cpu")


def test_options_that_cannot_be_are_refused(tmp_path):
    for device in ("gpu", "cuda:x", 1.5):
        with pytest.raises(ConfigError, match=f"device is {device!r}; expected 'cpu', 'cuda'"):
            load_encoder("untrained-nano", device)
    with pytest.raises(ConfigError, match="'untrained-nano' has no option num_heads"):
        load_encoder("untrained-nano", "cpu", num_heads=3)
    make().save(tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match=r"own\.safetensors: holds no teacher"):
        load_encoder(tmp_path / "own.safetensors", "cpu", weights="teacher")


def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ConfigError, match=f"device is '{device}', and torch (sees no|finds no such) GPU"):
            load_encoder("untrained-nano", device)
    assert next(load_encoder("untrained-nano", "auto").parameters()).device.type == "cpu"


def test_heads_that_a_file_knows_better_are_refused(tmp_path):
    make().save(tmp_path / "own.safetensors")
    assert load_encoder(tmp_path / "own.safetensors", "cpu", num_heads=1).embedding_dim
    with pytest.raises(ConfigError, match="num_heads is 2; the file says 1: leave it out"):
        load_encoder(tmp_path / "own.safetensors", "cpu", num_heads=2)


@pytest.mark.parametrize("num_heads", [0, -1, 3, 2.0, "2"])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, num_heads):
    torch.save(checkpoint.to_official_names(make().state_dict()), tmp_path / "official.pt")
    with pytest.raises(ConfigError, match=f"num_heads is {num_heads!r}; expected a whole number that divides"):
        load_encoder(tmp_path / "official.pt", "cpu", num_heads=num_heads)


def test_an_archive_with_one_file_of_weights_is_loaded(tmp_path):
    """As M2D's are released, in a folder whose name the archive has too."""
    torch.save(m2d_state(make()), tmp_path / "checkpoint-300.pth")
    for name in ("m2d-80x608p16x16.zip", "m2d-80x608p16x16p32k.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "checkpoint-300.pth", "m2d/checkpoint-300.pth")
            archive.writestr("m2d/LICENSE.pdf", b"%PDF")
            archive.writestr("__MACOSX/m2d/._checkpoint-300.pth", b"Mac OS X")
    encoder = load_encoder(f"m2d:{tmp_path}/m2d-80x608p16x16.zip", "cpu")
    assert encoder.id == load_encoder(tmp_path / "checkpoint-300.pth", "cpu").id
    with pytest.raises(CheckpointError, match="M2D at 32 kHz, by the name of its folder"):
        load_encoder(tmp_path / "m2d-80x608p16x16p32k.zip", "cpu")

    whole = (tmp_path / "m2d-80x608p16x16.zip").read_bytes()
    at = len(whole) // 2
    (tmp_path / "damaged.zip").write_bytes(
        whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 99]) + whole[at + 99 :]
    )
    with pytest.raises(CheckpointError, match=r"damaged\.zip: damaged torch checkpoint"):
        load_encoder(tmp_path / "damaged.zip", "cpu")


@pytest.mark.parametrize("names", [["one.pth", "two.pth"], ["README.md"]])
def test_an_archive_of_anything_else_is_told_from_weights(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "m2d.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"weights")
    with pytest.raises(CheckpointError, match=rf"m2d\.zip: an archive, of {', '.join(names)}; unpack it and give the"):
        load_encoder(tmp_path / "m2d.zip", "cpu")


def test_loading_imports_no_compiler():
    """Which some operations without memory would, for seconds."""
    code = "import sys, matpac_fast as mf; mf.load_encoder(device='cpu'); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
