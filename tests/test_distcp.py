"""What describes the parts of a distributed checkpoint is a pickle: it is read, and does nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata

from matpac_fast import distcp
from matpac_fast.checkpoint import PARTS, step_name
from matpac_fast.errors import CheckpointError
from matpac_fast.intact import intact_named

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    """A genuine one, of a single process."""
    dcp.save({"model.w": torch.arange(3.0)}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    (tmp_path / "c" / "matpac_fast.json").write_text('{"step": 1}')
    return tmp_path / "c"


def text(content: str) -> bytes:
    return b"X" + len(content).to_bytes(4, "little") + content.encode()


PATH, FORM = b"cpathlib\nPosixPath\n", b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
GETATTR = b"cbuiltins\ngetattr\n"
ABOUT = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
ATTRIBUTES = b"}" + text("parent") + PATH + text("/evil") + b"\x85Rs"


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (PATH + b"N" + ATTRIBUTES + b"\x86b.", "attributes of <class 'pathlib"),  # BUILD of the class, as slots
        (ABOUT + b"N" + ATTRIBUTES + b"\x86b.", "attributes of <class 'torch"),  # of one whose instances may be filled
        (FORM + b"K\x00\x85R" + ATTRIBUTES + b"b.", "attributes of <_MEM_FORMAT_ENCODING"),  # of the one member
        (b"cposix\nmkdir\n.", "posix.mkdir"),
        (GETATTR + FORM + text("__class__") + b"\x86R.", "'__class__' of <enum '_MEM_FORMAT_ENCODING'>"),
        (GETATTR + b"ctorch\nSize\n" + text("numel") + b"\x86R.", "'numel' of <class 'torch.Size'>"),
        (b"ctorch\nload\n.", "torch.load"),  # of a module that has names which are data
    ],
)
def test_what_would_change_the_process_is_refused(folder, pickled, named):
    (folder / ".metadata").write_bytes(b"\x80\x02" + pickled)
    with pytest.raises(CheckpointError, match=f"more than a description of tensors, it names {named}.* refused"):
        distcp.load(folder, "model.")
    assert pathlib.PurePosixPath("/a/b").parent.name == pathlib.Path("/a/b").parent.name == "a"
    assert not hasattr(metadata._MEM_FORMAT_ENCODING(0), "parent")


@pytest.mark.parametrize("content", [None, {"w": 1}, metadata.Metadata([]), metadata.Metadata({"w": None})])
def test_what_describes_no_tensors_is_damaged(folder, content):
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged: it holds no description of tensors"):
        distcp.load(folder)


def test_members_of_an_enum_are_read_as_every_python_writes_them(tmp_path, monkeypatch):
    """Python 3.11.2, as Debian 12 has it, writes getattr."""
    by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    dcp.save({"model.w": torch.arange(3.0)}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    (tmp_path / "c" / "matpac_fast.json").write_text("{}")
    assert b"getattr" in (tmp_path / "c" / ".metadata").read_bytes()
    assert distcp.load(tmp_path / "c", "model.")[0]["w"].tolist() == [0, 1, 2]


def test_a_genuine_one_is_read_and_any_damage_is_named(folder):
    assert distcp.load(folder, "model.")[0]["w"].tolist() == [0, 1, 2]
    path, chance = folder / ".metadata", random.Random(0)
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # what still describes tensors may be read
            distcp.load(folder, "model.")


@pytest.mark.parametrize("content", [None, b"{", b'{"step": "\xff"}', b"[" * 100_000, b"[1]"])
def test_metadata_that_is_lost_or_damaged_is_named(folder, content):
    (folder / "matpac_fast.json").unlink()
    if content is not None:
        (folder / "matpac_fast.json").write_bytes(content)
    reason = "cannot be read: No such file" if content is None else "damaged: "
    with pytest.raises(CheckpointError, match=rf"matpac_fast\.json: {reason}"):
        distcp.load(folder, "model.")


def test_a_size_beyond_all_memory_is_damage(folder):
    path = folder / ".metadata"
    about = pickle.loads(path.read_bytes())
    about.state_dict_metadata["model.w"].size = torch.Size([1 << 58])
    path.write_bytes(pickle.dumps(about))
    with pytest.raises(CheckpointError, match=f"{folder}: damaged: "):
        distcp.load(folder, "model.")


def test_a_disk_that_is_full_is_named(tmp_path):
    """Torch says `enforce fail at inline_container.cc`, and keeps the system's error behind it."""
    code = (
        "import resource, signal, sys, torch\n"
        "from matpac_fast import distcp\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "try:\n"
        "    distcp.save(sys.argv[1], {'a': torch.ones(3_000_000)}, {})\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == f"{errno.EFBIG} {os.strerror(errno.EFBIG)} (rank 0)"


def test_what_is_there_is_not_written_over(folder):
    with pytest.raises(OSError, match="already exists"):
        distcp.save(folder, {"model.w": torch.zeros(3)}, {})
    assert distcp.load(folder, "model.")[0]["w"].tolist() == [0, 1, 2]


def test_a_checkpoint_whose_optimizer_is_damaged_is_not_told_to_be_intact(tmp_path):
    tensors = {f"{part}.w": torch.ones(3_000) for part in ("model", "optimizer")}
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / step_name(step)
        folder.mkdir(parents=True)
        distcp.save(folder / PARTS, tensors, {})
        (folder / "state.json").write_text(json.dumps({"step": step}))
    (tmp_path / "latest").write_text(step_name(3))
    with pytest.raises(CheckpointError, match="^lost$"), intact_named(tmp_path, "{folder}"):
        raise CheckpointError("lost")  # not for want of a whole one
    for step, kept in ((2, 0.6), (3, 0.1)):  # the optimizer's weights are the last of the file
        [file] = (tmp_path / "checkpoints" / step_name(step) / PARTS).glob("*.distcp")
        file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    distcp.load(tmp_path / "checkpoints" / step_name(2) / PARTS, "model.")
    with pytest.raises(CheckpointError, match="lost. step-00000001 is intact: "), intact_named(tmp_path, "{folder}"):
        raise CheckpointError("lost")
    (tmp_path / "checkpoints" / step_name(1) / "state.json").unlink()  # as of a copy of the weights alone
    with pytest.raises(CheckpointError, match=r"lost\. No other checkpoint .* is intact"), intact_named(tmp_path, ""):
        raise CheckpointError("lost")
    with pytest.raises(CheckpointError, match="^lost$"), intact_named(tmp_path / "x.pt", ""):
        raise CheckpointError("lost")  # what is no run has none
