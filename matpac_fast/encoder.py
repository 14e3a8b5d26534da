"""load_encoder: every encoder by its name or from its file, and the registry of names."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import checkpoint, m2d
from .audio_encoder import AudioEncoder
from .choice import ENDINGS, Choice, parse
from .config import PRESETS, MatpacConfig
from .download import resolve
from .errors import CheckpointError, ConfigError
from .intact import intact_named
from .model import Matpac
from .nn.initial import in_float32
from .reference import LogMelConfig
from .vit_encoder import SIZES, encoder_of, sizes_of
from .weights import DEFAULT, PACKAGED

_UNTRAINED = "untrained-"
_ALIASES = {"random-init": "untrained-tiny"}
# What a file must be that is named "m2d:FILE"; without it, any kind.
KINDS = {"matpac": "MATPAC", "m2d": "M2D"}
_ENTRY_POINTS = "matpac_fast.encoders"
_RELEASES = "https://github.com/aurianworld/matpac/releases"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        name: without a colon or slash. One that is known already is replaced.
        load: a function (argument: str, device: torch.device, dtype: torch.dtype) -> AudioEncoder, or where it is,
            "module:function", which is imported when it is needed. The argument is "" where none was given. Where
            it has a parameter `num_heads`, that is what `load_encoder` was given.
        mark: a name that weights files of this kind hold and no others, by which `load_encoder("FILE")` knows them.

    Raises:
        ConfigError: a name that cannot be.
    """
    if not name or {":", os.sep} & set(name) or name in (*KINDS, *_ALIASES, *PACKAGED) or name.startswith(_UNTRAINED):
        raise ConfigError(
            f"register_encoder: name is {name!r}; expected one without a colon or {os.sep} that is not built in"
        )
    lazy = importlib.metadata.EntryPoint(name, load, _ENTRY_POINTS) if isinstance(load, str) else load
    _registry[name] = _Registered(lazy, mark)


def list_encoders(pattern: str = "*") -> list[str]:
    """Names that `load_encoder` knows, by shell pattern; most load without an argument, "hear" needs its module.

    They are the pre-trained encoder of this package and the untrained presets; the encoders of other methods, see
    docs/encoders.md; and what was registered, with `register_encoder` or in the entry-point group
    `matpac_fast.encoders`.
    """
    own = [*PACKAGED, *(_UNTRAINED + name for name in PRESETS), *_ALIASES, *_registry]
    others = sorted({entry.name for entry in _entry_points()} - set(own))
    return fnmatch.filter([*own, *others], pattern)


def load_encoder(
    name_or_path: str | os.PathLike[str] = DEFAULT,
    device: str | torch.device | None = None,
    num_heads: int | None = None,
    weights: str | None = None,
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
            A run or training checkpoint of MATPAC may end in "@teacher" or "@student", a run in "@20000", its
            checkpoint of that step, MATPAC and M2D in "@layer6", the network up to that layer, or in several of them,
            "@20000@teacher"; a path that exists is one, whatever it ends in.
            A file may be an address, "https://..." with or without "#sha256=HEX": it is downloaded once, into the
            folder that `MATPAC_FAST_CACHE` names or ~/.cache/matpac_fast, and its SHA-256 is checked each time;
            `MATPAC_FAST_OFFLINE=1` or `HF_HUB_OFFLINE=1` forbids the download.
        device: where to put it; by default, as by "auto", CUDA where there is one.
        num_heads: attention heads, for official files off the rule of 64 channels a head.
        weights: "student" or "teacher", where a training checkpoint holds one; by default what the name says, else
            the student, as the official package takes.
        dtype: "float32"; or "bfloat16": weights and matrix products in it, sums and norms in float32 (autocast).
        compile: run the network through torch.compile, which costs minutes once for each shape of window and pays for
            many alike.

    Raises:
        CheckpointError: no such name or file, a file that is damaged, unsafe, or no encoder; a download that failed.
        ConfigError: an option that cannot be, or that this encoder does not have.
    """
    return load_with_state(name_or_path, device, num_heads, weights, dtype, compile)[0]


def load_with_state(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    num_heads: int | None = None,
    weights: str | None = None,
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
) -> tuple[AudioEncoder, dict[str, Any]]:
    """`load_encoder`, and all that its file holds, by the file's names; of an encoder of another kind nothing."""
    name = resolve(os.fspath(name_or_path))
    device = _device(device)
    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ConfigError(f"load_encoder: dtype is {dtype!r}; expected {' or '.join(map(repr, _DTYPES))}")
    dtype = _DTYPES[str(dtype).removeprefix("torch.")]
    if weights not in (None, "student", "teacher"):
        raise ConfigError(f"load_encoder: weights is {weights!r}; expected 'student' or 'teacher'")
    path, kind, known_id, choice = name, None, None, Choice(name)
    # A Path that exists is one, whatever it is called.
    named = isinstance(name_or_path, str) or not os.path.exists(name)
    if named:
        name = _ALIASES.get(name, name)
        prefix, colon, argument = name.partition(":")
        if colon and not argument and not os.path.exists(name):
            raise ConfigError(f"load_encoder: {name!r} ends with its colon; expected what comes after it, or no colon")
        if prefix in KINDS and argument:
            kind = KINDS[prefix]
        elif name not in PACKAGED and os.sep not in prefix and (entry := _find(prefix)) is not None:
            try:
                return _load_registered(entry, prefix, argument, device, dtype, num_heads, weights, compile), {}
            except CheckpointError as error:  # its argument is its own and may end in anything
                if (theirs := parse(argument)).ending:
                    raise CheckpointError(f"{error}; {_of_matpac(theirs, prefix)}") from error
                raise
        choice = parse(argument if kind else name)
        path = choice.path if kind else _ALIASES.get(choice.path, choice.path)
        if choice.ending and kind is None and _find(path) is not None:
            raise ConfigError(f"load_encoder: {name!r}: {_of_matpac(choice, path)}")
    if weights is not None and choice.side not in (None, weights):
        raise ConfigError(
            f"load_encoder: weights is {weights!r}, and {name!r} says {choice.side!r}; leave one of them out"
        )
    side = choice.side or weights or "student"
    if named and kind is None and path in [_UNTRAINED + preset for preset in PRESETS]:
        if num_heads is not None:
            raise ConfigError(f"load_encoder: {path!r} has no option num_heads; leave it out")
        if choice.step is not None:
            raise ConfigError(f"load_encoder: {name!r}: only a run has steps; leave @{choice.step} out")
        config = MatpacConfig.preset(path.removeprefix(_UNTRAINED))
        state = ours = _untrained(config)
        sizes = sizes_of(config)
    else:
        if named and kind is None and path in PACKAGED:
            path = os.fspath(PACKAGED[path])
        state, metadata = _read(choice._replace(path=path))
        foreign = kind is None and not {"sizes", "config"} & set(metadata)
        for known, other in _registry.items():
            if foreign and other.mark is not None and other.mark in state:
                if choice.ending:
                    raise ConfigError(f"load_encoder: {name!r}: {_of_matpac(choice, known)}")
                return _load_registered(other, name, path, device, dtype, num_heads, weights, compile), {}
        ours, sizes, known_id = _interpret(state, metadata, path, kind, num_heads)
    encoder = encoder_of(ours, sizes, side, name)
    if known_id is not None and encoder.id != known_id:
        raise CheckpointError(
            f"{name}: altered or damaged: saved with SHA-256 {known_id[:12]}, it is {encoder.id[:12]}"
        )
    encoder.name = os.path.basename(name.removesuffix(choice.ending).rstrip("/")) + choice.ending
    if choice.layer is not None:
        encoder.cut(choice.layer)
    return encoder.to(device).prepare(dtype, compile), state


def _device(given: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given in (None, "auto") else given)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"load_encoder: device is {given!r}; expected 'cpu', 'cuda' or 'cuda:0', or none for what there is"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"load_encoder: device is {str(device)!r}, and torch sees no GPU; leave it out, or say 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"load_encoder: device is {str(device)!r}; torch finds {torch.cuda.device_count()} GPUs here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"load_encoder: device is {str(device)!r}, and torch finds no such GPU; leave it out")
    return device


def _untrained(config: MatpacConfig) -> dict[str, Tensor]:
    """A function of the seed alone, whatever dtype and device the application has made its defaults."""
    with in_float32(), torch.device("cpu"):
        return Matpac(config).state_dict()


def _of_matpac(choice: Choice, kind: str) -> str:
    of_run = choice.side is not None or choice.step is not None
    whose = "runs and training checkpoints of MATPAC" if of_run else "encoders of MATPAC and M2D"
    return f"{choice.ending} is for {whose}, and this is {kind}: leave it out"


def _read(choice: Choice) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        os.stat(choice.path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: of a path that cannot be
        endings = f"; a name may end in {ENDINGS}" if "@" in os.path.basename(choice.path) else ""
        raise CheckpointError(
            f"no encoder {choice.path!r}: neither a file nor one of {', '.join(list_encoders())}; give the path or "
            f"the https:// address of a released file, see {_RELEASES}{endings}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{choice.path}: cannot be read: {error.strerror}") from None
    source = choice.source()
    with intact_named(source, "to load it, give {folder}"):
        return checkpoint.load(checkpoint.find_weights(source))


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
        if whole and (odd := [key for key in state if not key.startswith(("frontend.", "student."))]):
            raise CheckpointError(f"{path}: altered: it has a tensor {odd[0]!r}, and no encoder has one")
        return state, sizes, metadata.get("id") if whole else None
    if found == "M2D":
        state, sizes = m2d.from_m2d(state, path)
    else:
        heads = ("head.", "head_norm.")
        state = checkpoint.from_official_names({k: v for k, v in state.items() if not k.startswith(heads)}, path)
        sizes = checkpoint.read_sizes(state, path)
    sizes["num_heads"] = checkpoint.heads_by_rule(sizes["width"], num_heads)
    kept = (*SIZES, "mean", "std", "framing")
    return state, {size: sizes[size] for size in kept if size in sizes}, None


def _own_sizes(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a file of this package says of its encoder, where that can be."""
    try:
        if "sizes" not in metadata:
            return sizes_of(MatpacConfig.from_dict(metadata["config"]))
        sizes = dict(metadata["sizes"])
        vit = MatpacConfig(**{size: sizes[size] for size in SIZES}, mask_ratio=0.5)
        front_end = {name: value for name, value in sizes.items() if name not in SIZES}
        LogMelConfig(n_mels=vit.n_mels, **front_end)
        return {size: getattr(vit, size) for size in SIZES} | front_end
    except KeyError as error:
        raise CheckpointError(f"{path}: damaged: its sizes lack {error}") from None
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged: its sizes cannot be: {error}") from None


def _find(name: str) -> _Registered | None:
    if name in _registry:
        return _registry[name]
    entries = {entry.value: entry for entry in _entry_points() if entry.name == name}
    if len(entries) > 1:
        raise ConfigError(
            f"load_encoder: {name!r} is what several installed packages call an encoder: {', '.join(sorted(entries))}; "
            "uninstall all but one, or register_encoder the one you mean"
        )
    return next(map(_Registered, entries.values()), None)


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=_ENTRY_POINTS)


def _load_registered(
    entry: _Registered,
    name: str,
    argument: str,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int | None,
    weights: str | None,
    compile: bool,
) -> AudioEncoder:
    load, where = entry.load, getattr(entry.load, "__qualname__", repr(entry.load))
    if isinstance(load, importlib.metadata.EntryPoint):
        where = load.value
        try:
            load = load.load()
        except (Exception, SystemExit) as error:  # another package's module may fail in any way at its import
            raise CheckpointError(f"encoder {name!r}: {where} does not load: {error}") from error
    options = {}
    if num_heads is not None and "num_heads" in inspect.signature(load).parameters:
        options["num_heads"] = num_heads
    refused = [("num_heads", num_heads is not None and not options), ("compile", compile)]
    if named := [option for option, given in [*refused, ("weights", weights == "teacher")] if given]:
        raise ConfigError(f"load_encoder: {name!r} has no option {', '.join(named)}; leave it out")
    encoder = load(argument, device, dtype, **options)
    if not isinstance(encoder, AudioEncoder):
        raise CheckpointError(f"encoder {name!r}: {where} gave a {type(encoder).__name__}, not an AudioEncoder")
    return encoder.requires_grad_(False).eval()
