"""Encoder: what is kept after pre-training, the ViT and its log-mel front end; and how it is loaded."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, m2d, ops
from .audio_encoder import AudioEncoder
from .config import PRESETS, MatpacConfig
from .download import resolve
from .embedding import Embeddings
from .errors import CheckpointError, ConfigError
from .model import Matpac
from .nn.frontend import Frontend
from .nn.vit import Attention, Block, Transformer
from .reference import LogMelConfig
from .weights import DEFAULT, PACKAGED

__all__ = ["DEFAULT", "Embeddings", "Encoder", "list_encoders", "load_encoder", "register_encoder"]

_SIZES = ("n_mels", "n_frames", "patch_size", "width", "depth", "num_heads", "mlp_ratio")
_UNTRAINED = "untrained-"
_ALIASES = {"random-init": "untrained-tiny"}
# What a file must be that is named "m2d:FILE"; without it, any kind.
KINDS = {"matpac": "MATPAC", "m2d": "M2D"}
_ENTRY_POINTS = "matpac_fast.encoders"
_RELEASES = "https://github.com/aurianworld/matpac/releases"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder(AudioEncoder):
    """The pre-trained ViT and its log-mel front end: of MATPAC, MATPAC++ or M2D.

    An embedding of a stretch of audio is the mean over time of its frames; a frame is the concatenation, low frequency
    first, of the `freq` patches of one 16-frame column: 5 x 768 = 3840 numbers for the official model. A window is
    padded with its mean to whole patches (160 ms); one longer than `native_seconds` is cut into pieces of that, whose
    frames are averaged together; all as in the official code.

    Make one with `load_encoder`.

    Args:
        n_mels, n_frames, patch_size, width, depth, num_heads, mlp_ratio: sizes, as in `MatpacConfig`.
        student: the transformer of these sizes; by default a new one.
        front_end: what differs from MATPAC's log-mel: `mean`, `std` and `framing` of `LogMelConfig`.
    """

    beyond = "averaged over pieces of that length"

    def __init__(
        self,
        n_mels: int = 80,
        n_frames: int = 608,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        *,
        student: Transformer | None = None,
        **front_end: Any,
    ):
        super().__init__()
        sizes = (n_mels, n_frames, patch_size, width, depth, num_heads, mlp_ratio)
        self.sizes = self.settings = dict(zip(_SIZES, sizes, strict=True)) | front_end
        self.log_mel_config = LogMelConfig(n_mels=n_mels, **front_end)
        self.centered = self.log_mel_config.framing == "center"  # the ends of a window are mirrored
        self.n_frames, self.patch_size, self.width, self.depth = n_frames, patch_size, width, depth
        self.freq = n_mels // patch_size
        self.frontend = Frontend(width, patch_size, self.freq, n_frames // patch_size)
        self.student = student or Transformer(width, depth, num_heads, mlp_ratio)
        self.dtype = torch.float32
        self._compiles = False
        self._compiled: Callable[..., list[Tensor]] | None = None  # made when it is needed; a copy makes its own

        self.sample_rate, self.embedding_dim, self.n_layers = self.log_mel_config.sample_rate, self.freq * width, depth
        self.min_samples = self.log_mel_config.n_fft
        self.frame_samples = patch_size * self.log_mel_config.hop
        if not self.centered:
            self.native_window = (self.log_mel_config.n_samples(n_frames), n_frames * self.log_mel_config.hop)
        self.requires_grad_(False).eval()

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame embedding to the next."""
        return self.patch_size * self.log_mel_config.hop / self.sample_rate

    @property
    def native_seconds(self) -> float:
        """The longest stretch that the transformer sees at once; longer windows are cut into pieces of it."""
        return self.n_frames * self.log_mel_config.hop / self.sample_rate

    def log_mel(self, waves: Tensor) -> Tensor:
        """(N, S) -> (N, n_mels, T) normalised log-mel; what is shorter than a frame is padded with zeros at the end."""
        return ops.log_mel(F.pad(waves, (0, max(0, self.min_samples - waves.shape[-1]))), self.log_mel_config)

    def columns(self, n_samples: int) -> list[int]:
        columns = -(-self.log_mel_config.n_frames(max(n_samples, self.min_samples)) // self.patch_size)
        whole, rest = divmod(columns, self.n_frames // self.patch_size)
        return [self.n_frames // self.patch_size] * whole + [rest] * (rest > 0)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        """Log-mels (n_mels, T) of whole patches, at most `n_frames` each."""
        config = self.log_mel_config
        starts, ends = spans.T
        whole = (ends - starts >= config.n_fft) | (ends >= len(clip))
        if not self.centered and (starts % config.hop == 0).all() and whole.all():
            # Every frame of a window is a frame of the clip, so all of them are computed once.
            needed = max(int(ends.max()), int(starts.max()) + config.n_fft)
            spec = self.log_mel(F.pad(clip, (0, max(0, needed - len(clip))))[None])[0]
            for a, b in spans.tolist():
                yield from self._cut(spec[:, a // config.hop :][:, : config.n_frames(max(b - a, config.n_fft))])
            return
        breaks = np.flatnonzero(np.diff(ends - starts)) + 1
        for group in np.split(spans, breaks):  # of one length
            for some in np.array_split(group, -(-len(group) // 64)):
                waves = [F.pad(clip[a:b], (0, max(0, b - len(clip)))) for a, b in some.tolist()]
                for spec in self.log_mel(torch.stack(waves)):
                    yield from self._cut(spec)

    def _cut(self, spec: Tensor) -> tuple[Tensor, ...]:
        return F.pad(spec, (0, -spec.shape[-1] % self.patch_size)).split(self.n_frames, dim=-1)

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return self.forward_groups([pieces], pool, layers)[0]

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self._compiles:  # a graph for each shape, not for each company that shapes may have
                self._compiled = self._compiled or torch.compile(self._forward)
                return [self._compiled([pieces], pool, layers)[0] for pieces in groups]
            return self._forward(groups, pool, layers)

    def _forward(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        """All tokens go through the linear layers together, so that each weight is read once whatever the lengths."""
        tokens = [self.frontend(spec) for spec in groups]
        shapes = [(len(t), t.shape[1]) for t in tokens]
        sizes = [n * length for n, length in shapes]
        x = torch.cat([t.flatten(0, 1) for t in tokens])  # (N, D)
        found: list[list[Tensor]] = [[] for _ in groups]
        for i, block in enumerate(cast("list[Block]", list(self.student.blocks))):
            x = x + _attention(block.attn, block.norm1(x), shapes)
            x = x + block.mlp(block.norm2(x))
            if layers == "all" or i == self.depth - 1:
                # Each layer is pooled as it is made: the frames of all are never held together.
                out = self.student.norm(x) if i == self.depth - 1 else x
                for part, shape, mine in zip(out.split(sizes), shapes, found, strict=True):
                    mine.append(self._pool(part.unflatten(0, shape), pool))
        return [torch.stack(mine, dim=1) for mine in found]

    def _pool(self, tokens: Tensor, pool: str) -> Tensor:
        """(N, 1 + freq * T, D) -> frames (N, T, E), or their sum (N, E)."""
        grid = tokens[:, 1:].float().unflatten(1, (self.freq, -1))  # (N, freq, T, D)
        return grid.sum(2).flatten(1) if pool == "mean" else grid.transpose(1, 2).flatten(2)

    def prepare(self, dtype: torch.dtype = torch.float32, compile: bool = False) -> Encoder:
        """Compute in `dtype` from here on, through torch.compile if asked; see `load_encoder`."""
        self.dtype = dtype
        if dtype != torch.float32:
            # Rounded once; autocast would round them anew in every forward pass.
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)
        self._compiles = self._compiles or compile
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Of copy and pickle: the compiled function is bound to this encoder's weights.
        return {**super().__getstate__(), "_compiled": None}

    def save(self, path: str | os.PathLike[str], dtype: str = "float32") -> None:
        """Write the encoder alone as safetensors, all of it or none; `load_encoder` reads it and checks its id.

        Args:
            path: the file.
            dtype: "float32"; or "float16", half the size: then the file is another encoder, of rounded weights, with
                an id of its own.

        Raises:
            ConfigError: another dtype, or an encoder that was loaded in bfloat16.
        """
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"save: dtype is {dtype!r}; expected 'float32' or 'float16'")
        if self.dtype != torch.float32:
            raise ConfigError(f"save: the weights are rounded to {self.dtype}; load the encoder in float32 to save it")
        stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in self.state_dict().items()}
        rounded = encoder_of(stored, self.sizes, "student", os.fspath(path))
        checkpoint.save(path, stored, {"kind": "encoder", "sizes": self.sizes, "id": rounded.id})


def encoder_of(state: Mapping[str, Tensor], sizes: Mapping[str, Any], side: str, source: str) -> Encoder:
    """The encoder of one side of a model, "student" or "teacher", with a copy of its weights, in float32.

    Args:
        state: weights under `Matpac`'s names; others than those of the side and the front end are left alone.
        sizes: as `Encoder` takes them.
        source: begins the error's message.

    Raises:
        CheckpointError: a side that is not there; weights that are missing, left over, misshapen or no plain numbers.
    """
    wanted = ("frontend.", f"{side}.")
    kept = {k.replace(f"{side}.", "student.", 1): v for k, v in state.items() if k.startswith(wanted)}
    if not any(name.startswith("student.") for name in kept):
        raise CheckpointError(f"{source}: holds no {side}; expected weights of one, student or teacher")
    if sizes["depth"] > len(kept):
        raise CheckpointError(f"{source}: {sizes['depth']} blocks by its sizes, and only {len(kept)} tensors of them")
    width, depth, patch = sizes["width"], sizes["depth"], sizes["patch_size"]
    tokens = 1 + (sizes["n_mels"] // patch) * (sizes["n_frames"] // patch)
    with torch.device("meta"):  # no memory, no random numbers
        student = Transformer(width, depth, sizes["num_heads"], sizes["mlp_ratio"])
        fits = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
        fits |= {"frontend.cls_token": torch.empty(1, 1, width), "frontend.pos_embed": torch.empty(1, tokens, width)}
        fits |= {"frontend.patch_embed.proj.weight": torch.empty(width, 1, patch, patch)}
        fits |= {"frontend.patch_embed.proj.bias": torch.empty(width)}
    checkpoint.check_fits(fits, kept, source)
    if odd := [name for name, tensor in kept.items() if not _is_whole(tensor)]:
        raise CheckpointError(
            f"{source}: damaged: it holds not all numbers of {odd[0]}, which has {kept[odd[0]].numel()}"
        )
    # The small front end is made as it is: without memory, its positions would have torch import its compiler.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        encoder = Encoder(**sizes, student=student)
    whole = {
        name: tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in kept.items()
    }
    encoder.load_state_dict(whole, assign=True)
    return encoder


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is dense and its memory holds each of its numbers; a pickle may repeat one without end."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _attention(attention: Attention, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """`Attention.forward` for sequences of several lengths one after the other, shapes (sequences, tokens): (N, D)."""
    out = []
    for part, (n, length) in zip(attention.qkv(x).split([n * length for n, length in shapes]), shapes, strict=True):
        qkv = part.reshape(n, length, 3, attention.num_heads, -1)
        out.append(ops.attention(qkv).reshape(n * length, -1))
    return attention.proj(torch.cat(out))


# (argument, device, dtype) -> the encoder, on the device; it may take num_heads by name.
Loader: TypeAlias = "Callable[..., AudioEncoder]"


@dataclass(frozen=True)
class _Registered:
    load: Loader | importlib.metadata.EntryPoint
    mark: str | None = None


_registry: dict[str, _Registered] = {}


def register_encoder(name: str, load: Loader | str, mark: str | None = None) -> None:
    """Make `load_encoder("name")` and `load_encoder("name:argument")` known, in this process.

    A package whose encoders should be known everywhere, the command line and its worker processes among them, has
    an entry point instead: a name and "module:function" in the group `matpac_fast.encoders`.

    Args:
        name: without a colon. One that is known already is replaced.
        load: a function (argument: str, device: torch.device, dtype: torch.dtype) -> AudioEncoder, or where it is,
            "module:function", which is imported when it is needed. The argument is "" where none was given. Where
            it has a parameter `num_heads`, that is what `load_encoder` was given.
        mark: a name that weights files of this kind hold and no others, by which `load_encoder("FILE")` knows them.

    Raises:
        ConfigError: a name that cannot be.
    """
    if not name or ":" in name or name in (*KINDS, *_ALIASES, *PACKAGED) or name.startswith(_UNTRAINED):
        raise ConfigError(f"register_encoder: name is {name!r}; expected one without a colon that is not built in")
    lazy = importlib.metadata.EntryPoint(name, load, _ENTRY_POINTS) if isinstance(load, str) else load
    _registry[name] = _Registered(lazy, mark)


def list_encoders(pattern: str = "*") -> list[str]:
    """Names that `load_encoder` knows without a file, by shell pattern.

    They are the pre-trained encoder of this package and the untrained presets; the encoders of other methods, see
    docs/encoders.md; and what was registered, with `register_encoder` or in the entry-point group
    `matpac_fast.encoders`.
    """
    others = sorted(set(_entry_points()) - set(_registry))
    untrained = [_UNTRAINED + name for name in PRESETS]
    return fnmatch.filter([*PACKAGED, *untrained, *_ALIASES, *_registry, *others], pattern)


def load_encoder(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    device: str | torch.device | None = None,
    num_heads: int | None = None,
    weights: str = "student",
    *,
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
) -> AudioEncoder:
    """Load an encoder by name or from a file, whose content says what it is; none of it is ever run as code.

    Nothing is downloaded but an address that you give; all else works offline, always.

    Args:
        name_or_path: by default this package's own pre-trained encoder, whose model card is weights/README.md. Else a
            run folder of `matpac-fast pretrain` (its newest checkpoint); a checkpoint or encoder file of this package,
            the latter checked against the SHA-256 it was saved with; an official training checkpoint or released
            encoder file, of MATPAC, MATPAC++, M2D, PaSST, BEATs or CNN14; or a name of `list_encoders`,
            "name:argument" where it takes one, such as "passt:FILE". "matpac:FILE" and "m2d:FILE" insist on the kind.
            Names come before files and folders: one that is called like a name is written "./name".
            A file may be an address, "https://..." with or without "#sha256=HEX": it is downloaded once, into the
            folder that `MATPAC_FAST_CACHE` names or ~/.cache/matpac_fast, and its SHA-256 is checked each time;
            `MATPAC_FAST_OFFLINE=1` or `HF_HUB_OFFLINE=1` forbids the download.
        device: where to put it; by default CUDA where there is one.
        num_heads: attention heads, for official files off the rule of 64 channels a head.
        weights: "student", as the official package takes, or "teacher", where a training checkpoint holds one.
        dtype: "float32"; or "bfloat16": weights and matrix products in it, sums and norms in float32 (autocast).
        compile: run the network through torch.compile, which costs minutes once for each shape of window and pays for
            many alike.

    Raises:
        CheckpointError: no such name or file, a file that is damaged, unsafe, or no encoder; a download that failed.
        ConfigError: an option that cannot be, or that this encoder does not have.
    """
    name = resolve(os.fspath(name_or_path))
    device = _device(device)
    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ConfigError(f"load_encoder: dtype is {dtype!r}; expected {' or '.join(map(repr, _DTYPES))}")
    dtype = _DTYPES[str(dtype).removeprefix("torch.")]
    if weights not in ("student", "teacher"):
        raise ConfigError(f"load_encoder: weights is {weights!r}; expected 'student' or 'teacher'")
    path, kind, known_id = name, None, None
    # A Path that exists is one, whatever it is called.
    named = isinstance(name_or_path, str) or not os.path.exists(name)
    if named:
        name = path = _ALIASES.get(name, name)
        prefix, colon, argument = name.partition(":")
        if colon and not argument and not os.path.exists(name):
            raise ConfigError(f"load_encoder: {name!r} ends with its colon; expected what comes after it, or no colon")
        if name in PACKAGED:
            path = os.fspath(PACKAGED[name])
        elif prefix in KINDS and argument:
            path, kind = argument, KINDS[prefix]
        elif os.sep not in prefix and (entry := _find(prefix)) is not None:
            return _load_registered(entry, prefix, argument, device, dtype, num_heads, weights, compile)
    if named and kind is None and path in [_UNTRAINED + preset for preset in PRESETS]:
        if num_heads is not None:
            raise ConfigError(f"load_encoder: {name!r} has no option num_heads; leave it out")
        config = MatpacConfig.preset(path.removeprefix(_UNTRAINED))
        state, sizes = _untrained(config), sizes_of(config)
    else:
        state, metadata = _read(path)
        foreign = kind is None and not {"sizes", "config"} & set(metadata)
        for other in _registry.values():
            if foreign and other.mark is not None and other.mark in state:
                return _load_registered(other, name, path, device, dtype, num_heads, weights, compile)
        state, sizes, known_id = _interpret(state, metadata, path, kind, num_heads)
    encoder = encoder_of(state, sizes, weights, name)
    if known_id is not None and encoder.id != known_id:
        raise CheckpointError(
            f"{name}: altered or damaged: saved with SHA-256 {known_id[:12]}, it is {encoder.id[:12]}"
        )
    encoder.name = os.path.basename(name.rstrip("/"))
    return encoder.to(device).prepare(dtype, compile)


def sizes_of(config: MatpacConfig) -> dict[str, Any]:
    """Of its encoder, as `Encoder` takes them."""
    return {size: getattr(config, size) for size in _SIZES}


def _device(given: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"load_encoder: device is {given!r}; expected 'cpu', 'cuda' or 'cuda:0', or none for what there is"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"load_encoder: device is {str(device)!r}, and torch sees no GPU; leave it out, or say 'cpu'")
    return device


def _untrained(config: MatpacConfig) -> dict[str, Tensor]:
    """A function of the seed alone, whatever dtype and device the application has made its defaults."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return Matpac(config).state_dict()
    finally:
        torch.set_default_dtype(default)


def _read(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not os.path.exists(path):
        raise CheckpointError(
            f"no encoder {path!r}: neither a file nor one of {', '.join(list_encoders())}; give the path or "
            f"the https:// address of a released file, see {_RELEASES}"
        )
    return checkpoint.load(checkpoint.find_weights(path))


def _interpret(
    state: dict[str, Any], metadata: dict[str, Any], path: str, kind: str | None, num_heads: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Weights under our names, the encoder's sizes, and its SHA-256 where the file says it."""
    ours = "sizes" in metadata or "config" in metadata
    found = "MATPAC" if ours else "M2D" if m2d.is_m2d(state) else "MATPAC" if checkpoint.is_official(state) else None
    if found is None or found != (kind or found):
        raise CheckpointError(
            f"{path}: not a checkpoint of {kind or 'MATPAC or M2D'}; its first names are {', '.join(list(state)[:3])}"
        )
    if ours:
        whole, sizes = "sizes" in metadata, _own_sizes(metadata, path)
        if num_heads not in (None, sizes["num_heads"]):
            raise ConfigError(f"{path}: num_heads is {num_heads}; the file says {sizes['num_heads']}: leave it out")
        return state, sizes, metadata.get("id") if whole else None
    if found == "M2D":
        state, sizes = m2d.from_m2d(state, path)
    else:
        heads = ("head.", "head_norm.")
        state = checkpoint.from_official_names({k: v for k, v in state.items() if not k.startswith(heads)})
        sizes = checkpoint.read_sizes(state)
    sizes["num_heads"] = checkpoint.heads_by_rule(sizes["width"], num_heads)
    kept = (*_SIZES, "mean", "std", "framing")
    return state, {size: sizes[size] for size in kept if size in sizes}, None


def _own_sizes(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a file of this package says of its encoder, where that can be."""
    try:
        if "sizes" not in metadata:
            return sizes_of(MatpacConfig.from_dict(metadata["config"]))
        sizes, numbers = dict(metadata["sizes"]), {size: metadata["sizes"][size] for size in _SIZES}
        MatpacConfig(**numbers, mask_ratio=0.5)
        front_end = {name: value for name, value in sizes.items() if name not in _SIZES}
        LogMelConfig(n_mels=sizes["n_mels"], **front_end)
        if any(type(value) is not int for value in numbers.values()):
            raise TypeError("sizes are whole numbers")
        if any(type(front_end.get(name, 0.0)) not in (int, float) for name in ("mean", "std")):
            raise TypeError("mean and std are numbers")
    except KeyError as error:
        raise CheckpointError(f"{path}: damaged: its sizes lack {error}") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: its sizes cannot be: {error}") from None
    return sizes


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS)}


def _find(name: str) -> _Registered | None:
    entry = None if name in _registry else _entry_points().get(name)
    return _registry.get(name) if entry is None else _Registered(entry)


def _load_registered(
    entry: _Registered,
    name: str,
    argument: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int | None,
    weights: str,
    compile: bool,
) -> AudioEncoder:
    load, where = entry.load, getattr(entry.load, "__qualname__", repr(entry.load))
    if isinstance(load, importlib.metadata.EntryPoint):
        where = load.value
        try:
            load = load.load()
        except Exception as error:  # another package's module may fail in any way at its import
            raise CheckpointError(f"encoder {name!r}: {where} does not load: {error}") from error
    options = {}
    if num_heads is not None and "num_heads" in inspect.signature(load).parameters:
        options["num_heads"] = num_heads
    refused = [("num_heads", num_heads is not None and not options), ("compile", compile)]
    if named := [option for option, given in [*refused, ("weights", weights != "student")] if given]:
        raise ConfigError(f"load_encoder: {name!r} has no option {', '.join(named)}; leave it out")
    encoder = load(argument, device, dtype, **options)
    if not isinstance(encoder, AudioEncoder):
        raise CheckpointError(f"encoder {name!r}: {where} gave a {type(encoder).__name__}, not an AudioEncoder")
    return encoder.eval()
