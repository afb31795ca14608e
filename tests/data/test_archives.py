import functools
import gzip
import http.client
import http.server
import io
import socket
import threading
import urllib.request

import numpy as np
import pytest

from jaxeff import data
from jaxeff.data import archives

# The fixture of conftest.py silences the network; this is the real function.
opened = archives.opened


@pytest.fixture
def server(manual, monkeypatch):
    """A local web server on the folder of archives, asked directly and not through a proxy."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(archives, "opened", opened)

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


def test_host_that_has_the_file_answers_with_it(server, manual):
    (manual / "file").write_bytes(b"content")
    with opened(f"{server}/file", 5) as answer:
        assert answer.read() == b"content"


def test_closed_port_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="no network: 127.0.0.1 cannot be reached: .*refused"):
            opened(f"http://127.0.0.1:{closed.getsockname()[1]}", 5)


@pytest.fixture(params=["http", "https"])
def silent(request, monkeypatch):
    """Address of a host that accepts connections and then says nothing."""
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as host:
        yield f"{request.param}://127.0.0.1:{host.getsockname()[1]}"


def test_host_that_accepts_and_stays_silent_is_given_up(silent):
    with pytest.raises(ConnectionError, match="no network: 127.0.0.1 did not answer within 0.05 s"):
        opened(silent, 0.05)


def test_proxy_that_accepts_and_stays_silent_is_given_up(silent, monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": silent})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: False)
    with pytest.raises(ConnectionError, match="no network: example.invalid did not answer within 0.05 s"):
        opened("https://example.invalid/file", 0.05)


def test_answer_that_comes_in_drops_is_given_up(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    stop = threading.Event()

    def drip(host):
        connection = host.accept()[0]
        with connection:
            while not stop.wait(0.01):  # Every drop starts the time-out of the socket anew.
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as host:
        thread = threading.Thread(target=drip, args=(host,))
        thread.start()
        with pytest.raises(ConnectionError, match="did not answer within 0.1 s"):
            opened(f"http://127.0.0.1:{host.getsockname()[1]}", 0.1)
        stop.set()
        thread.join()


def test_name_resolution_that_hangs_is_given_up(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(urllib.request, "getproxies", dict)

    def hang(*args, **kwargs):
        released.wait()
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(ConnectionError, match="example.invalid did not answer within 0.01 s"):
            opened("https://example.invalid", 0.01)
    finally:
        released.set()


def test_answer_that_comes_too_late_is_closed(monkeypatch):
    released, closed = threading.Event(), threading.Event()

    class Late:
        close = closed.set

        def open(self, url, timeout):
            released.wait()
            return self

    monkeypatch.setattr(urllib.request, "build_opener", Late)
    with pytest.raises(ConnectionError, match="did not answer"):
        opened("http://example.invalid", 0.01)
    released.set()
    assert closed.wait(10)


def test_proxy_is_asked_instead_of_the_host(server, manual, monkeypatch):
    (manual / "file").write_bytes(b"content")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"http": server})
    monkeypatch.setattr(urllib.request, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "translate_path", lambda self, path: str(manual / "file"))
    with opened("http://example.invalid/file", 5) as answer:
        assert answer.read() == b"content"


def test_missing_set_behind_a_silent_host_is_an_error_in_time(silent, monkeypatch):
    monkeypatch.setattr(archives, "opened", opened)
    _serve("kmnist", silent, monkeypatch)
    with pytest.raises(FileNotFoundError, match="no network: 127.0.0.1 did not answer within 0.9 s"):
        data.load("kmnist")


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
    with pytest.raises(ConnectionError, match="train-images-idx3-ubyte.gz cannot be downloaded: .*404"):
        archives.download("mnist", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_download_of_another_file_keeps_nothing_of_it(write_archives, server, manual, tmp_path, monkeypatch):
    write_archives("mnist")
    _serve("mnist", server, monkeypatch)
    (manual / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>please log in</html>")
    with pytest.raises(ValueError, match=f"{server}/train-labels-idx1-ubyte.gz has 26 bytes, expected"):
        archives.download("mnist", tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_download_that_breaks_off_says_so(write_archives, tmp_path, monkeypatch):
    write_archives("mnist")

    class Broken(io.BytesIO):
        def read(self, size):
            raise http.client.IncompleteRead(b"", 100)

    monkeypatch.setattr(archives, "opened", lambda url, seconds: Broken())
    with pytest.raises(ConnectionError, match="train-images-idx3-ubyte.gz broke off: IncompleteRead"):
        archives.download("mnist", tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_only_the_first_answer_has_to_be_quick(write_archives, manual, tmp_path, monkeypatch):
    write_archives("mnist")
    asked = []

    def answer(url, seconds):
        asked.append(seconds)
        return (manual / url.rsplit("/", 1)[1]).open("rb")

    monkeypatch.setattr(archives, "opened", answer)
    archives.download("mnist", tmp_path / "to", 2)
    assert asked == [2, 30, 30, 30]


def test_download_without_a_network_says_so_and_makes_no_folder(tmp_path):
    with pytest.raises(ConnectionError, match="no network: www.cs.toronto.edu did not answer within 0.9 s"):
        archives.download("cifar10", tmp_path / "to")
    assert not (tmp_path / "to").exists()
