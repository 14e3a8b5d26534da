"""Encoders by the address of their file: downloaded once, checked each time, and refused with the reason."""

from __future__ import annotations

import http.client
import http.server
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from matpac_fast import download as downloads
from matpac_fast import get_matpac, load_encoder
from matpac_fast.errors import CheckpointError
from matpac_fast.files import sha256
from matpac_fast.weights import DEFAULT, PACKAGED

FILE = PACKAGED[DEFAULT]
PIN = f"#sha256={sha256(FILE)}"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback and keeps the paths asked for; /broken.* ends before its length, /to? goes on,
    /any/ is the encoder's file, /late/ too, after a moment, and /plain/ without its length; /nonsense is no HTTP."""

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, request, address, server):
        super().__init__(request, address, server, directory=str(server.folder))

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/broken"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
        elif self.path == "/endless":
            self.send_response(200)
            self.send_header("Content-Length", "abc")
            self.end_headers()
        elif self.path.startswith("/plain/"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILE.read_bytes())
        elif self.path == "/nonsense":
            self.wfile.write(b"220 a server of mail\r\n")
        elif self.path.startswith(("/any/", "/late/")):
            time.sleep(0.2 if self.path.startswith("/late/") else 0)
            self.path = "/e.safetensors"
            super().do_GET()
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MATPAC_FAST_CACHE", str(tmp_path / "cache"))
    for name in ("MATPAC_FAST_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "www").mkdir()
    shutil.copy(FILE, tmp_path / "www" / "e.safetensors")
    with Server(tmp_path / "www") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("prefix", ["", "matpac:"])
def test_a_file_is_downloaded_once_and_never_where_offline(server, tmp_path, monkeypatch, prefix):
    name = f"{prefix}{server.address}/e.safetensors{PIN}"
    encoder = load_encoder(name, "cpu")
    assert encoder.id == load_encoder(device="cpu").id
    assert encoder.name == "e.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_encoder(name, "cpu").id == encoder.id
    assert get_matpac(f"{server.address}/e.safetensors{PIN}", device="cpu").encoder.id == encoder.id
    shouted = f"{prefix}{server.address.replace('http', 'HTTP')}/e.safetensors{PIN}"
    for same in (shouted, Path(name)):  # a Path makes one slash of two
        assert load_encoder(same, "cpu").id == encoder.id
    assert server.asked == ["/e.safetensors"]
    assert kept(tmp_path) == ["e.safetensors", "sha256"]
    with pytest.raises(CheckpointError, match="other.pt: not in .*cache, and HF_HUB_OFFLINE forbids downloads"):
        load_encoder(f"{server.address}/other.pt{PIN}", "cpu")


def test_an_address_that_leads_elsewhere_is_followed(server):
    assert load_encoder(f"{server.address}/to?/e.safetensors{PIN}", "cpu").name == "to"


def test_a_kept_file_that_changes_is_refused(server, tmp_path):
    name = f"{server.address}/e.safetensors{PIN}"
    path = Path(downloads.resolve(name))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since it was downloaded.*; delete it to download it anew"):
        load_encoder(name, "cpu")
    path.unlink()
    assert sha256(downloads.resolve(name)) == sha256(FILE)


@pytest.mark.parametrize("lost", ["e.safetensors", "sha256"])
def test_a_file_or_record_that_is_lost_is_downloaded_again(server, tmp_path, lost):
    name = f"{server.address}/e.safetensors{PIN}"
    path = Path(downloads.resolve(name))
    (path.parent / lost).unlink()
    assert downloads.resolve(name) == str(path)
    assert server.asked == ["/e.safetensors"] * 2
    assert kept(tmp_path) == ["e.safetensors", "sha256"]
    (path.parent / "sha256").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="changed since it was downloaded"):
        downloads.resolve(name)


def test_a_file_may_come_without_its_length(server):
    assert sha256(downloads.resolve(f"{server.address}/plain/e.safetensors{PIN}")) == sha256(FILE)


def test_another_file_than_expected_is_refused_and_not_kept(server, tmp_path):
    wrong = "#sha256=" + 64 * "0"
    with pytest.raises(CheckpointError, match=f"SHA-256 is {sha256(FILE)}, expected 0{{64}}; nothing was kept"):
        downloads.resolve(f"{server.address}/e.safetensors{wrong}")
    assert kept(tmp_path) == []
    downloads.resolve(f"{server.address}/e.safetensors{PIN}")
    with pytest.raises(CheckpointError, match="expected 0{64}; delete it"):
        downloads.resolve(f"{server.address}/e.safetensors{wrong}")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nothing.pt", "the server answered 404"),
        ("/endless", "the connection broke: Content-Length is 'abc'; expected a number of bytes; fetch it elsewhere"),
        ("/nonsense", "the connection broke: 220 a server of mail; fetch it elsewhere"),
        ("/broken.pt", "the connection broke: .*; fetch it elsewhere and give its path"),
        ("/login.html", "the server sent a web page, .*; give the address of the file itself"),
    ],
)
def test_what_fails_leaves_nothing(server, tmp_path, path, says):
    (server.folder / "login.html").write_text("<!DOCTYPE html>", encoding="utf-8")
    with pytest.raises(CheckpointError, match=says):
        downloads.resolve(server.address + path + PIN)
    assert kept(tmp_path) == []


def test_a_server_that_falls_silent_is_not_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_SILENT_FOR", 0.05)
    with pytest.raises(CheckpointError, match="the connection broke: timed out; fetch it elsewhere"):
        downloads.resolve(f"{server.address}/late/e.safetensors{PIN}")
    assert kept(tmp_path) == []


def test_a_pin_is_the_same_in_capitals(server):
    assert sha256(downloads.resolve(f"{server.address}/any/e.pt#sha256={sha256(FILE).upper()}")) == sha256(FILE)


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    for name, value, folder in (
        ("HOME", "/h", "/h/.cache/matpac_fast"),
        ("XDG_CACHE_HOME", "/x", "/x/matpac_fast"),
        ("MATPAC_FAST_CACHE", "~/own", "/h/own"),
    ):
        for other in ("XDG_CACHE_HOME", "MATPAC_FAST_CACHE"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert downloads.cache_folder() == Path(folder)


@pytest.mark.parametrize("own", ["", "~/own"])
def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch, own):
    for other in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("MATPAC_FAST_CACHE", own)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as of a number that a container made up
    with pytest.raises(CheckpointError, match="no home folder; let MATPAC_FAST_CACHE name a folder"):
        downloads.resolve("https://example.org/x.pt")


@pytest.mark.parametrize("name", ["MATPAC_FAST_OFFLINE", "HF_HUB_OFFLINE"])
def test_downloads_are_forbidden_in_every_word_for_yes(monkeypatch, name):
    for other in ("MATPAC_FAST_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    for word, forbids in (("1", True), ("ON", True), ("yes", True), ("True", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, word)
        assert downloads.offline() == (name if forbids else None)


def test_a_folder_that_cannot_be_written_is_told_with_the_way_out(server, tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*cache: Not a directory; let MATPAC_FAST_CACHE"):
        downloads.resolve(f"{server.address}/e.safetensors{PIN}")


def test_no_server_is_one_error(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match="no connection: .*; fetch it elsewhere"):
        downloads.resolve(f"{server.address}/e.safetensors{PIN}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("http://localhost/e.pt", "http://localhost/e.pt: anybody on the way could change it; use https://"),
        ("HTTP://localhost/e.pt", "http://localhost/e.pt: anybody on the way could change it; use https://"),
        ("https://localhost/e.pt#sha256=12", "expected #sha256= and 64 hexadecimal digits"),
        ("https://[", r"https://\[: is no address: Invalid IPv6 URL; expected https://HOST/FILE"),
        ("m2d:https://localhost/e.pt#md5=12", "expected #sha256= and 64 hexadecimal digits"),
    ],
)
def test_addresses_that_cannot_be(name, says):
    with pytest.raises(CheckpointError, match=says):
        downloads.resolve(name)


@pytest.fixture
def tls(server, monkeypatch):
    """https://tls.test is the test's server, which does not speak TLS."""

    class Plain(urllib.request.HTTPSHandler):
        def https_open(self, req):
            req.host = server.address.removeprefix("http://")
            return self.do_open(http.client.HTTPConnection, req)

    monkeypatch.setattr(urllib.request, "HTTPSHandler", Plain)
    return "https://tls.test"


def test_without_a_pin_the_first_download_is_the_pin(server, tls, caplog):
    caplog.set_level("INFO", logger="matpac_fast")
    path = downloads.resolve(f"{tls}/e.safetensors")
    assert f"{tls}/e.safetensors{PIN}" in caplog.text
    assert sha256(path) == sha256(FILE)
    assert downloads.resolve(f"{tls}/e.safetensors") == path
    assert server.asked == ["/e.safetensors"]


@pytest.mark.parametrize("steps", ["{http}/e.safetensors", "{http}/to?{tls}/e.safetensors", "ftp://127.0.0.1/e.pt"])
def test_an_address_that_leads_out_of_https_is_refused_at_any_step(server, tls, tmp_path, steps):
    steps = steps.format(http=server.address, tls=tls)
    name = f"{tls}/to?{tls}/to?{steps}"
    with pytest.raises(CheckpointError, match=f"leads to {steps.partition('?')[0]}.* expected https://, or #sha256="):
        downloads.resolve(name)
    assert kept(tmp_path) == []
    if steps.startswith("ftp"):
        with pytest.raises(CheckpointError, match="leads to ftp:.* expected https:// or http://"):
            downloads.resolve(name + PIN)
    else:
        assert sha256(downloads.resolve(name + PIN)) == sha256(FILE)
    assert sha256(downloads.resolve(f"{tls}/to?{tls}/e.safetensors")) == sha256(FILE)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Cnn14_mAP=0.431.pth", "Cnn14_mAP=0.431.pth"),
        ("mod%C3%A8le.safetensors", "mod\u00e8le.safetensors"),
        ("mod\u00e8le 2.safetensors", "mod\u00e8le 2.safetensors"),
        ("sha256", "_sha256"),
        ("%2e%2e", "_.."),
        (".e.pt", "_.e.pt"),
        ("a%00%2Fb%5C%0A", "a__b__"),
        ("/", "any"),
    ],
)
def test_a_file_is_kept_under_a_name_that_does_no_harm_and_found_again(server, tmp_path, path, name):
    address = f"{server.address}/any/{path}{PIN}"
    first = Path(downloads.resolve(address))
    assert first.name == name
    assert sha256(first) == sha256(FILE)
    assert downloads.resolve(address) == str(first)
    assert len(server.asked) == 1
    assert kept(tmp_path) == sorted([name, "sha256"])


@pytest.mark.parametrize("name", ["matpac-nano", "runs/a", "passt:weights/passt.pt", "hear:module:file", "C:/x.pt"])
def test_everything_else_is_left_as_it_is(name):
    assert downloads.resolve(name) == name
