"""Downloads from a server that stalls, drops connections, misreports lengths and serves wrong files."""

import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from detlib.utils import download as download_module
from detlib.utils.download import Checksum, DownloadError, checksum_in_name, download, is_offline
from detlib.utils.file_io import HuggingFaceHandler, PathManager

CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """A server of `content` at every path. `faults` are the faults of the first requests, in order."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        self.content, self.etag, self.ranges = CONTENT, '"1"', True
        self.faults, self.requests = [], []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        fault = server.faults.pop(0) if server.faults else ""
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()
            return
        body, start = server.content, 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        body = body[start:]
        extra = 5000 if fault == "too long" else 0
        self.send_header("Content-Length", str(len(body) + extra))
        self.send_header("Content-Type", "text/html" if fault == "web page" else "application/octet-stream")
        self.send_header("ETag", server.etag)
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(body[:100_000])
            self.wfile.flush()
            time.sleep(1.5 if fault == "stall" else 0)
            return
        self.wfile.write(b"x" * len(body) if fault == "wrong" else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(download_module, "_LONGEST_PAUSE", 0.02)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


def leftovers(path):
    return sorted(
        p.name for p in path.parent.iterdir() if p.name != path.name and p.suffix not in (".lock", ".sha256")
    )


def test_existing_file_is_not_downloaded_again(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        download(f"{server.url}/file.bin", str(path))
    assert path.read_bytes() == CONTENT
    assert ranges(server) == [None] and not leftovers(path)


def test_lost_connections_are_resumed(server, tmp_path):
    server.faults = ["cut", "cut"]
    path = tmp_path / "file.bin"
    download(f"{server.url}/file.bin", str(path))
    assert path.read_bytes() == CONTENT and not leftovers(path)
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-"]


def test_stalled_connection_is_resumed(server, tmp_path):
    server.faults = ["stall"]
    path = tmp_path / "file.bin"
    download(f"{server.url}/file.bin", str(path), timeout=0.3)
    assert path.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]


def test_later_process_resumes_an_unfinished_download(server, tmp_path):
    server.faults = ["cut"]
    path = tmp_path / "file.bin"
    with pytest.raises(DownloadError, match="lost after 100000 bytes"):
        download(f"{server.url}/file.bin", str(path), attempts=0)
    assert not path.exists()
    download(f"{server.url}/file.bin", str(path))
    assert path.read_bytes() == CONTENT and ranges(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize("change", ["another file", "no ranges"])
def test_download_restarts_if_it_cannot_resume(server, tmp_path, change):
    server.faults = ["cut"]
    path = tmp_path / "file.bin"
    with pytest.raises(DownloadError):
        download(f"{server.url}/file.bin", str(path), attempts=0)
    if change == "another file":
        server.content, server.etag = CONTENT[::-1], '"2"'
    else:
        server.ranges = False
    download(f"{server.url}/file.bin", str(path))
    assert path.read_bytes() == server.content and not leftovers(path)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_temporary_server_errors_are_retried(server, tmp_path, status):
    server.faults = [status, status]
    download(f"{server.url}/file.bin", str(tmp_path / "file.bin"))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_server_errors_raise_without_retry(server, tmp_path, status):
    server.faults = [status]
    path = tmp_path / "file.bin"
    with pytest.raises(DownloadError, match=f"returned {status}.*manually to {path}"):
        download(f"{server.url}/file.bin", str(path))
    assert len(server.requests) == 1 and not path.exists()


def test_wrong_content_length_raises(server, tmp_path):
    server.faults = ["too long"] * 20
    path = tmp_path / "file.bin"
    with pytest.raises(DownloadError, match="returned 416|lost after 300000 bytes"):
        download(f"{server.url}/file.bin", str(path), attempts=3)
    assert not path.exists() and len(server.requests) < 9


def test_unreachable_server_raises(tmp_path, monkeypatch, server):
    url = f"{server.url}/file.bin"
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="no connection"):
        download(url, str(tmp_path / "file.bin"), attempts=2, timeout=0.3)


def test_web_page_instead_of_file_raises(server, tmp_path):
    server.faults = ["web page"]
    with pytest.raises(DownloadError, match="web page"):
        download(f"{server.url}/model.pkl", str(tmp_path / "model.pkl"))
    assert not (tmp_path / "model.pkl").exists()


def test_checksums_in_names():
    assert checksum_in_name("model_final_f10217.pkl") == Checksum("md5", "f10217")
    assert checksum_in_name("model_0039999_e76410.pkl") == Checksum("md5", "e76410")
    assert checksum_in_name("resnet50-19c8e357.pth") == Checksum("sha256", "19c8e357")
    for name in ("R-50.pkl", "model_final.pth", "model_0039999.pth", "X-101-32x8d.pkl", "a-cafe.pth"):
        assert checksum_in_name(name) is None


@pytest.mark.parametrize("name", [f"model_final_{MD5[:6]}.pkl", f"resnet-{SHA256[:8]}.pth"])
def test_wrong_checksum_raises_after_one_retry(server, tmp_path, name):
    path = tmp_path / name
    server.faults = ["wrong"]  # damaged once in transit
    download(f"{server.url}/{name}", str(path))
    assert path.read_bytes() == CONTENT and len(server.requests) == 2
    path.unlink()
    server.faults = ["wrong", "wrong"]
    with pytest.raises(DownloadError, match="different file under this name"):
        download(f"{server.url}/{name}", str(path))
    assert not path.exists() and not leftovers(path)


@pytest.mark.parametrize("name", ["file.bin", f"model_final_{MD5[:6]}.pkl"])
@pytest.mark.parametrize("change", ["cut", "changed"])
def test_damaged_file_in_the_cache_is_downloaded_again(server, tmp_path, monkeypatch, caplog, name, change):
    path = tmp_path / name
    download(f"{server.url}/{name}", str(path))
    damaged = CONTENT[:-1] if change == "cut" else b"x" + CONTENT[1:]
    path.write_bytes(damaged)
    os.utime(path, (1, 1))  # some file systems have a coarse clock
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    words = "bytes instead of 300000" if change == "cut" else "sum begins with"
    with pytest.raises(DownloadError, match=f"{name} of .* is damaged: .*{words}.*DETLIB_OFFLINE"):
        download(f"{server.url}/{name}", str(path))
    assert path.read_bytes() == damaged and len(server.requests) == 1
    monkeypatch.delenv("DETLIB_OFFLINE")
    download(f"{server.url}/{name}", str(path))
    assert path.read_bytes() == CONTENT and len(server.requests) == 2
    # A file that was put there by hand has the checksum in its name only.
    for file in tmp_path.iterdir():
        file.unlink()
    path.write_bytes(b"mine")
    download(f"{server.url}/{name}", str(path))
    assert path.read_bytes() == (b"mine" if name == "file.bin" else CONTENT)


def test_offline_raises_unless_the_file_exists(server, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    with pytest.raises(DownloadError, match=f"DETLIB_OFFLINE.*manually to {path}"):
        download(f"{server.url}/file.bin", str(path))
    assert not server.requests
    path.write_bytes(b"x")
    download(f"{server.url}/file.bin", str(path))


@pytest.mark.parametrize("value, offline", [(None, False), ("", False), ("0", False), ("1", True)])
def test_is_offline(value, offline, monkeypatch):
    monkeypatch.delenv("DETLIB_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("DETLIB_OFFLINE", value)
    assert is_offline() is offline


def test_insufficient_disk_space_raises_before_download(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="MB are free"):
        download(f"{server.url}/file.bin", str(tmp_path / "file.bin"))


def test_concurrent_processes_download_the_file_once(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = ["stall"]
    call = f"download({server.url + '/a'!r}, {str(path)!r}, timeout=5)"
    code = f"from detlib.utils.download import download; {call}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    assert path.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]


def test_cache_paths(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "fvcore"))
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path / "cache"))
    one = PathManager.get_local_path(f"{server.url}/a/file.bin")
    assert one == str(tmp_path / "cache" / f"127.0.0.1_{server.server_port}" / "a" / "file.bin")
    other = PathManager.get_local_path(f"{server.url}/a/file.bin?version=2")
    assert other != one and other.endswith(".bin")
    with PathManager.open(f"{server.url}/a/file.bin", "rb") as f:
        assert f.read() == CONTENT
    assert len(server.requests) == 2
    with pytest.raises(ValueError, match="read-only"):
        PathManager.open(f"{server.url}/a/file.bin", "wb")
    assert PathManager.isfile(f"{server.url}/b") and not PathManager.exists(f"{server.url}/missing")
    handler = PathManager._path_handlers["https://"]
    zoo = handler.cached_path("https://dl.fbaipublicfiles.com/detectron2/a/../b.pkl")
    assert zoo == str(tmp_path / "cache" / "detectron2" / "a" / "b.pkl")
    monkeypatch.delenv("DETLIB_CACHE")
    assert handler.cached_path("https://x.org/b").startswith(str(tmp_path / "fvcore"))


def test_hugging_face_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.faults = ["redirect"]
    local = PathManager.get_local_path("hf://owner/repo@v2/weights/model.safetensors")
    assert Path(local).read_bytes() == CONTENT
    (first, headers), (second, later_headers) = server.requests
    assert first == "/owner/repo/resolve/v2/weights/model.safetensors" and second == "/elsewhere"
    assert headers["Authorization"] == "Bearer secret" and "Authorization" not in later_headers
    assert HuggingFaceHandler().url("hf://o/r/f") == f"{server.url}/o/r/resolve/main/f"
    with pytest.raises(ValueError, match="hf://owner/repo/file"):
        PathManager.get_local_path("hf://owner/file")


def test_object_stores(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    root = "memory://bucket/run"
    PathManager.mkdirs(root)
    with PathManager.open(f"{root}/a.txt", "w") as f:
        f.write("one")
    assert PathManager.isdir(root) and PathManager.isfile(f"{root}/a.txt")
    assert PathManager.ls(root) == ["a.txt"]
    first = PathManager.get_local_path(f"{root}/a.txt")
    assert Path(first).read_text() == "one" and PathManager.get_local_path(f"{root}/a.txt") == first
    (tmp_path / "local").write_text("two, longer")
    PathManager.copy_from_local(str(tmp_path / "local"), f"{root}/a.txt", overwrite=True)
    assert Path(PathManager.get_local_path(f"{root}/a.txt")).read_text() == "two, longer"
    with pytest.raises(FileExistsError):
        PathManager.copy_from_local(str(tmp_path / "local"), f"{root}/a.txt", overwrite=False)
    PathManager.copy(f"{root}/a.txt", f"{root}/b.txt")
    PathManager.mv(f"{root}/b.txt", f"{root}/c.txt")
    PathManager.rm(f"{root}/a.txt")
    assert PathManager.ls(root) == ["c.txt"]
    with pytest.raises(FileNotFoundError, match="Object memory://bucket/run/a.txt does not exist"):
        PathManager.get_local_path(f"{root}/a.txt")
    with pytest.raises(ValueError, match="Cannot append"):
        PathManager.open(f"{root}/c.txt", "a")


def test_object_store_without_fsspec_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"detlib\[cloud\]"):
        PathManager.exists("s3://bucket/a")
