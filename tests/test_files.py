"""Files that are whole or not there, with the permissions that any new file gets."""

import os
import stat

import pytest

from matpac_fast.errors import ConfigError
from matpac_fast.files import atomic, check_no_file, write_text


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_gets_the_permissions_of_any_new_one(tmp_path, umask):
    (tmp_path / "any").touch()
    write_text(tmp_path / "text", "a")
    with atomic(tmp_path / "replaced") as beside:  # as safetensors does
        beside.unlink()
        os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("any", "text", "replaced"), 0o666 & ~umask)


def test_a_disk_that_keeps_no_permissions_keeps_the_file(tmp_path, monkeypatch):
    def chmod(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chmod", chmod)
    with atomic(tmp_path / "file") as beside:
        beside.unlink()
        os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    assert (tmp_path / "file").exists()


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_place_after(tmp_path, monkeypatch):
    """A power cut leaves the old file or the new one, never an empty one."""
    did, fsync, replace = [], os.fsync, os.replace

    def noted(handle):
        did.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: did.append("replace") or replace(*paths))
    write_text(tmp_path / "a", "text")
    assert did == ["file", "replace", "folder"]


def test_an_error_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a", "old")

    def fails():
        with atomic(tmp_path / "a") as beside:
            beside.write_text("ne")
            raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        fails()
    assert caught.value.filename == str(tmp_path / "a")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_an_error_names_the_file_and_not_what_is_written_beside_it(tmp_path):
    path = tmp_path / ("x" * 250)  # a name that is as long as it may be, and too long with a suffix
    with pytest.raises(OSError, match="too long") as caught, atomic(path):
        pass
    assert caught.value.filename == str(path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(OSError, match="directory") as caught, atomic(tmp_path / "sub") as beside:
        beside.write_text("x")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "sub"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["sub"]


def test_a_text_may_tell_of_a_name_that_is_not_utf_8(tmp_path):
    write_text(tmp_path / "text", "h\xe9 " + os.fsdecode(b"\xff"))
    assert (tmp_path / "text").read_bytes() == b"h\xc3\xa9 \\udcff"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/target")
    for text in ("new", "newer"):  # at first a link to nothing
        write_text(tmp_path / "link", text)
        assert os.readlink(tmp_path / "link") == "there/target"
        assert (tmp_path / "there" / "target").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "target", "there"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "to pipe", "loop"):
        with pytest.raises(ConfigError, match=f"{name}: not a regular file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "pipe", "to pipe"]


def test_what_stands_where_a_folder_should_is_said(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "to here").symlink_to(tmp_path)
    for name, kind in (("file", "a file"), ("link", "a link to nothing")):
        with pytest.raises(ConfigError, match=f"{name}: {kind}, where a folder for the run was expected"):
            check_no_file(tmp_path / name, "the run")
    for name in (".", "to here", "new"):
        check_no_file(tmp_path / name, "the run")
