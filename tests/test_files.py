"""Files that are whole or not there, with the permissions that any new file gets."""

import os
import stat

import pytest

from matpac_fast.files import atomic, write_text


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
