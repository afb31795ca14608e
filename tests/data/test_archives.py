import functools
import gzip
import http.server
import socket
import threading
import urllib.request

import numpy as np
import pytest

from jaxeff.data import archives

# The fixture of conftest.py silences the module's probe; this is the real one.
network_answers = archives.network_answers


@pytest.fixture
def server(manual, monkeypatch):
    """A local web server on the folder of archives, asked directly and not through a proxy."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(archives, "network_answers", network_answers)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(manual))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


def _serve(name, address, monkeypatch):
    files = tuple(file._replace(url=f"{address}/{file.name}") for file in archives.ARCHIVES[name])
    monkeypatch.setitem(archives.ARCHIVES, name, files)


@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_archives_are_read(write_archives, manual, split):
    image, label = write_archives("mnist")[split]
    ours = archives.read_idx_split(manual, split)
    np.testing.assert_array_equal(ours[0], image)
    np.testing.assert_array_equal(ours[1], label)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_archives_are_read(write_archives, manual, name, split):
    image, label = write_archives(name)[split]
    ours = archives.read_cifar_split(name, manual, split)
    np.testing.assert_array_equal(ours[0], image)
    np.testing.assert_array_equal(ours[1][:, -1], label)
    assert archives.read_cifar_names(name, manual)[3] == "class_3"


def test_file_that_is_not_idx_is_refused(manual):
    with gzip.open(manual / "x.gz", "wb") as file:
        file.write(b"hello")
    with pytest.raises(ValueError, match="x.gz is not an idx file"):
        archives.read_idx(manual / "x.gz")


def test_idx_file_shorter_than_its_header_says_is_refused(manual):
    with gzip.open(manual / "x.gz", "wb") as file:
        file.write(b"\x00\x00\x08\x01\x00\x00\x00\x05abc")
    with pytest.raises(ValueError, match=r"holds 3 values, but its header says \(5,\)"):
        archives.read_idx(manual / "x.gz")


def test_unchanged_archives_pass(write_archives, manual):
    write_archives("kmnist")
    archives.verify("kmnist", manual)


def test_missing_archives_are_all_named_with_their_addresses(manual):
    with pytest.raises(FileNotFoundError) as error:
        archives.verify("mnist", manual)
    for file in archives.ARCHIVES["mnist"]:
        assert f"{file.name} from {file.url}" in str(error.value)


def test_other_size_is_refused(write_archives, manual):
    write_archives("mnist")
    with (manual / "t10k-labels-idx1-ubyte.gz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz has \d+ bytes, expected \d+"):
        archives.verify("mnist", manual)


def test_other_content_of_equal_size_is_refused(write_archives, manual):
    write_archives("mnist")
    path = manual / "train-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz has SHA-256 checksum"):
        archives.verify("mnist", manual)


def test_listening_host_answers(server):
    assert network_answers(server)


def test_closed_port_does_not_answer(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert not network_answers(f"http://127.0.0.1:{port}")


def test_name_resolution_that_hangs_does_not_hang_the_probe(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(urllib.request, "getproxies", dict)

    def hang(*args, **kwargs):
        released.wait()
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", hang)
    try:
        assert not network_answers("https://example.invalid", seconds=0.01)
    finally:
        released.set()


def test_proxy_is_asked_instead_of_the_host(server, monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": server})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: False)
    assert network_answers("http://example.invalid/file")


def test_download_fetches_and_checks(write_archives, server, manual, tmp_path, monkeypatch):
    write_archives("mnist")
    _serve("mnist", server, monkeypatch)
    archives.download("mnist", tmp_path / "to")
    for file in archives.ARCHIVES["mnist"]:
        assert (tmp_path / "to" / file.name).read_bytes() == (manual / file.name).read_bytes()


def test_download_of_a_file_that_is_gone_names_the_address(write_archives, server, manual, tmp_path, monkeypatch):
    write_archives("mnist")
    _serve("mnist", server, monkeypatch)
    (manual / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ConnectionError, match="train-images-idx3-ubyte.gz broke off: .*404"):
        archives.download("mnist", tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_download_without_a_network_says_so(tmp_path):
    with pytest.raises(ConnectionError, match="no network: www.cs.toronto.edu did not answer within"):
        archives.download("cifar10", tmp_path)
