"""Archives of the same three files: whole ones, and such as are damaged, locked or odd, each in a way of its own."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NAMES = ("b.flac", "a.wav", "deep/c.OGG")  # not in the order of their names


def tar(files: Path, path: Path, names=(*NAMES, "notes.txt")) -> None:
    with tarfile.open(path, "w") as file:
        for name in names:
            file.add(files / name, name)


def zipped(files: Path, path: Path, names=(*NAMES, "notes.txt")) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.write(files / name, name)


def parquet(files: Path, path: Path, names=NAMES) -> None:
    audio = [{"bytes": (files / name).read_bytes(), "path": f"there/{os.path.basename(name)}"} for name in names]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"label": list(range(len(names))), "audio": pa.array(audio, kind)})
    pq.write_table(table, path, row_group_size=2)


PACKERS = {"x.tar": tar, "x.ZIP": zipped, "x.parquet": parquet}


def cut_tar(files: Path, path: Path) -> None:
    tar(files, path)
    with tarfile.open(path) as file:
        end = file.getmember("a.wav").offset_data + 600
    os.truncate(path, end)


def headless_tar(files: Path, path: Path) -> None:
    """Cut inside a header, which tarfile takes for the end."""
    tar(files, path)
    with tarfile.open(path) as file:
        end = file.getmember("a.wav").offset + 100
    os.truncate(path, end)


def flipped_zip(files: Path, path: Path) -> None:
    zipped(files, path)
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("a.wav").header_offset + 60
    data = bytearray(path.read_bytes())
    data[start : start + 20] = bytes(20)
    path.write_bytes(data)


def half_parquet(files: Path, path: Path) -> None:
    parquet(files, path)
    path.write_bytes(path.read_bytes()[:-100])


def names_alone(files: Path, path: Path) -> None:
    audio = [{"bytes": (files / "b.flac").read_bytes(), "path": None}, {"bytes": None, "path": "/home/me/x.wav"}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"audio": pa.array(audio, kind)}), path)


def huge_tar(files: Path, path: Path) -> None:
    """A header that promises more than any memory."""
    huge = tarfile.TarInfo("huge.wav")
    huge.size = 1 << 60
    tar(files, path, ["b.flac"])
    with tarfile.open(path) as file:
        file.getmembers()
        end = file.offset
    path.write_bytes(path.read_bytes()[:end] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(1000))


def flipped(kind: int):
    def pack(files: Path, path: Path) -> None:
        with zipfile.ZipFile(path, "w", kind) as file:
            for name in ("a.wav", "b.flac"):
                file.write(files / name, name)
        data = bytearray(path.read_bytes())
        data[60:400] = bytes(340)
        path.write_bytes(data)

    return pack


def zip_of_no_utf8(files: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.write(files / "a.wav", "é.wav")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))


def zip_of_tomorrow(files: Path, path: Path) -> None:
    zipped(files, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99
    path.write_bytes(data)


def locked_zip(files: Path, path: Path) -> None:
    zipped(files, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def parquet_of_no_utf8(files: Path, path: Path) -> None:
    data = pa.array([(files / "a.wav").read_bytes()], pa.binary())
    name = pa.array([b"\xff.wav"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"audio": pa.StructArray.from_arrays([data, name], ["bytes", "path"])}), path)


def numbered_parquet(files: Path, path: Path) -> None:
    pq.write_table(pa.table({"audio": [{"bytes": (files / "a.wav").read_bytes(), "path": 7}]}), path)


def flipped_parquet(files: Path, path: Path) -> None:
    """The bytes of the first of two row groups are damaged."""
    parquet(files, path)
    start = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)


def tar_of_links(files: Path, path: Path) -> None:
    tar(files, path, ["a.wav"])
    with tarfile.open(path, "a") as file:
        for name, kind in (
            ("hard.wav", tarfile.LNKTYPE),
            ("soft.wav", tarfile.SYMTYPE),
            ("pipe.wav", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.wav"
            file.addfile(info)


def tar_with_holes(files: Path, path: Path) -> None:
    tar(files, path, ["a.wav"])
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("holes.wav")
        info.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "1000", "GNU.sparse.name": "holes.wav"}
        info.size = 512
        file.addfile(info, io.BytesIO(bytes(512)))


def tar_of_archives(files: Path, path: Path) -> None:
    tar(files, path, ["a.wav"])
    with tarfile.open(path, "a") as file:
        for name in ("deep/in.zip", "in.tar.gz", "labels.parquet", "folder.zip/"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            file.addfile(info)


def zip_of_archives(files: Path, path: Path) -> None:
    zipped(files, path, ["a.wav"])
    with zipfile.ZipFile(path, "a") as file:
        for name in ("deep/in.zip", "in.tar.gz", "labels.parquet", "folder.zip/"):
            file.writestr(name, b"")


def tar_gz(files: Path, path: Path) -> None:
    tar(files, path)
    path.write_bytes(gzip.compress(path.read_bytes()))
