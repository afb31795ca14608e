import contextlib
import errno
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.sdm.convert import tables_of, write_tables
from jaxeff.sdm.disk import Disk
from jaxeff.sdm.encoding import KINDS, RowFormat, decode, encode
from jaxeff.sdm.stored_file import CorruptTable, DiskFull, NoStore, StoreBusy, StoreError, WriteError
from jaxeff.sdm.table import TableSpec, open_store
from jaxeff.sdm.versions import versions
from jaxeff.sdm.writer import Writer, roll_back

SPEC = TableSpec("t", 50, RowFormat("float32", 4))


def _publish(folder, value, disk=None, keep=1):
    with Writer(folder, keep=keep, disk=disk) as writer:
        writer.add(SPEC, [np.full((50, 4), value, np.float32)], remap=np.arange(50) if value % 2 else None)
        return writer.publish()


def _value(folder):
    """The value of the version that is served, all of it verified; None where there is none."""
    try:
        with open_store(folder, verify="all") as store:
            (rows,) = store.tables[0].stream()
            values = decode(rows, SPEC.format)
            assert (values == values[0, 0]).all()
            return float(values[0, 0])
    except NoStore:
        return None


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    # What is durable is modelled by `_PowerCut`; waiting for this machine's disk would show nothing.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class _Cut(BaseException):
    """The power went."""


class _PowerCut(Disk):
    """A disk that dies before step k, and may lose what was not made durable, as a file system may.

    A file that was not synchronised loses half of itself. Of the changes to the names in a folder that was not, all are
    lost ("all"), or the oldest rename and no other ("rename").
    """

    def __init__(self, step, loses=None):
        self.left, self.loses, self.steps = step, loses, []
        self.unsynced, self.undo = {}, []

    def _step(self, name):
        if self.left == 0:
            self._die()
        self.left -= 1
        self.steps.append(name)

    def _die(self):
        files, names, loses = list(self.unsynced.values()), self.undo, self.loses
        self.unsynced, self.undo, self.loses = {}, [], None
        if loses:
            for descriptor in files:
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        renames = [back for _, back, rename in names if rename]
        for back in {"rename": renames[:1], "all": [back for _, back, _ in reversed(names)], None: []}[loses]:
            back()
        for descriptor in [*files, *(folder for folder, _, _ in names)]:
            os.close(descriptor)
        raise _Cut

    def _changed(self, folder, back, rename=False):
        # By descriptors, as a folder may get another name before its power goes.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.undo.append((descriptor, lambda: back(descriptor), rename))

    def make_folder(self, path):
        self._step("make_folder")
        super().make_folder(path)
        self._changed(path.parent, lambda _: shutil.rmtree(path, ignore_errors=True))

    def create(self, path):
        def back(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=folder)

        self._step("create")
        file = super().create(path)
        self.unsynced[file] = os.dup(file.fileno())
        self._changed(path.parent, back)
        return file

    def write(self, file, data, offset=None):
        self._step("write")
        super().write(file, data, offset)

    def sync(self, file):
        self._step("sync")
        os.close(self.unsynced.pop(file))

    def rename(self, source, target):
        def back(_):
            os.rename(target, source)
            if before is not None:
                target.write_bytes(before)

        self._step(f"rename {target.name}")
        before = target.read_bytes() if target.is_file() else None
        super().rename(source, target)
        self._changed(target.parent, back, rename=True)

    def sync_folder(self, path):
        self._step("sync_folder")
        kept = []
        for change in self.undo:
            if os.path.samestat(os.fstat(change[0]), os.stat(path)):
                os.close(change[0])
            else:
                kept.append(change)
        self.undo = kept

    def remove(self, path):
        self._step("remove")
        super().remove(path)


@pytest.mark.parametrize("loses", [None, "rename", "all"])
@pytest.mark.parametrize("older", [0, 1, 2])
def test_a_writer_cut_at_every_step_leaves_the_old_version_or_the_new(tmp_path, loses, older):
    def begin(folder):
        for value in range(older):
            _publish(folder, value, keep=2)
        return _value(folder)

    begin(tmp_path / "whole")
    whole = _PowerCut(-1)
    _publish(tmp_path / "whole", 3, whole)
    # From the rename on it may be the new one, and once that is durable it must be.
    may = whole.steps.index("rename CURRENT") + 1
    must = may if loses is None else may + 1
    assert whole.steps[may] == "sync_folder" and len(whole.steps) == may + 1 + 3 * older
    for step in range(len(whole.steps)):
        folder = tmp_path / str(step)
        before = begin(folder)
        with pytest.raises(_Cut):
            _publish(folder, 3, _PowerCut(step, loses))
        assert _value(folder) in ({before} if step < may else {3} if step >= must else {before, 3})
        for version in versions(folder):
            with contextlib.suppress(StoreError):  # whole or refused, whatever has the name of a version
                open_store(folder, version, verify="all").close()
        _publish(folder, 5)
        assert _value(folder) == 5
        left = {path.name for path in folder.iterdir()} - {"CURRENT", "LOCK"}
        assert left == set(versions(folder)) and len(left) == 1


_KILLED = """
import os, pathlib, sys
import numpy as np
from jaxeff.sdm.disk import Disk
from jaxeff.sdm.encoding import RowFormat
from jaxeff.sdm.table import TableSpec
from jaxeff.sdm.writer import Writer

def publish(folder, value, disk=None):
    with Writer(folder, keep=1, disk=disk) as writer:
        writer.add(TableSpec("t", 50, RowFormat("float32", 4)), [np.full((50, 4), value, np.float32)])
        writer.publish()

class Killed(Disk):
    def __getattribute__(self, name):
        if name in ("make_folder", "create", "write", "sync", "rename", "sync_folder", "remove"):
            if Killed.left == 0:
                os._exit(9)
            Killed.left -= 1
        return super().__getattribute__(name)

for Killed.left in range(30):
    folder, step = pathlib.Path(sys.argv[1]) / str(Killed.left), Killed.left
    publish(folder, 2)
    child = os.fork()
    if not child:
        publish(folder, 3, Killed())
        os._exit(0)
    print(step, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_process_killed_before_any_step_leaves_the_old_version_or_the_new(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], timeout=120, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes = dict(map(int, line.split()) for line in done.stdout.splitlines())
    finished = min(step for step, code in codes.items() if code == 0)
    assert [codes[step] for step in range(30)] == [9] * finished + [0] * (30 - finished) and finished > 10
    found = [_value(tmp_path / str(step)) for step in range(30)]
    assert sorted(found) == found and set(found) == {2, 3} and found[finished] == 3
    for step in range(30):
        _publish(tmp_path / str(step), 4)
        assert _value(tmp_path / str(step)) == 4
        assert len(list((tmp_path / str(step)).iterdir())) == 3


class _Failing(Disk):
    """A disk whose n-th step of a kind fails."""

    def __init__(self, kind, number, code):
        def step(*arguments):
            self.left -= 1
            if self.left == 0:
                raise OSError(code, os.strerror(code))
            return getattr(Disk, kind)(self, *arguments)

        self.left = number
        setattr(self, kind, step)


@pytest.mark.parametrize("kind", ["make_folder", "create", "write", "sync", "rename", "sync_folder"])
@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, WriteError)]
)
def test_a_disk_that_fails_publishes_nothing_and_keeps_nothing(tmp_path, kind, code, error):
    failures = 0
    for number in range(1, 20):
        folder = tmp_path / str(number)
        _publish(folder, 2)
        disk = _Failing(kind, number, code)
        try:
            _publish(folder, 4, disk)
        except StoreError as raised:
            assert type(raised) is error and str(folder) in str(raised)
            failures += 1
            left = {path.name for path in folder.iterdir()}
            # When the disk fails after CURRENT was replaced, the new version is whole and is served.
            assert (_value(folder), left) in [
                (2, {"CURRENT", "LOCK", "v000001"}),
                (4, {"CURRENT", "LOCK", "v000001", "v000002"}),
            ]
        except UserWarning as warned:
            assert "v000002 is published, but v000001 could not be removed" in str(warned)
            assert _value(folder) == 4
        else:
            assert _value(folder) == 4
            if disk.left > 0:
                break
    assert failures


def test_a_table_that_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Disk, "free", lambda self, path: 8191)
    came = []
    with pytest.raises(DiskFull, match="table 't' needs 8192 bytes, 8191 are free"), Writer(tmp_path) as writer:
        writer.add(SPEC, (came.append(1) for _ in range(1)))
    assert not came and [path.name for path in tmp_path.iterdir()] == ["LOCK"]


def test_two_writers_at_once_are_an_error(tmp_path):
    with Writer(tmp_path) as writer:
        with pytest.raises(StoreBusy, match=f"another writer .process {os.getpid()}. is at work; wait"):
            _publish(tmp_path, 1)
        writer.add(SPEC, [np.zeros((50, 4), np.float32)])
        writer.publish()
    assert _publish(tmp_path, 1) == "v000002"


def test_readers_see_whole_versions_while_a_writer_publishes(tmp_path):
    _publish(tmp_path, 0)
    done, failures, seen = threading.Event(), [], set()

    def read():
        while not done.is_set():
            try:
                seen.add(_value(tmp_path))
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for value in range(1, 25):
        _publish(tmp_path, value)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures and None not in seen and _value(tmp_path) == 24


def test_chunks_of_any_length_make_the_same_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(997, 5)).astype(np.float32)
    fmt = RowFormat("int8", 5)
    spec = TableSpec("t", 997, fmt)
    ways = [
        [values],
        np.split(values, [1, 2, 400, 400, 990]),
        [encode(values, fmt)],
        [values[begin : begin + 10] for begin in range(0, 997, 10)],
        [jnp.asarray(values)],
    ]
    for packing in ("dense", "block"):
        contents = set()
        for index, chunks in enumerate(ways):
            with Writer(tmp_path / packing / str(index), 512, packing) as writer:
                table = writer.add(spec, iter(chunks))
                writer.publish()
            with open_store(tmp_path / packing / str(index)) as store:
                assert store.tables[0].size == table.size
                contents.add(store.tables[0].path.read_bytes())
        assert len(contents) == 1


def test_an_iterator_may_use_its_memory_again(tmp_path):
    def chunks():
        buffer = np.empty((7, 4), np.float32)
        for begin in range(0, 49, 7):
            buffer[:] = np.arange(begin, begin + 7)[:, None]
            yield buffer

    with Writer(tmp_path, 512, "block") as writer:
        writer.add(TableSpec("t", 49, RowFormat("float32", 4)), chunks(), stride=100)
        writer.publish()
    with open_store(tmp_path) as store:
        (rows,) = store.tables[0].stream()
        np.testing.assert_array_equal(decode(rows, RowFormat("float32", 4))[:, 0], np.arange(49))


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_without_rows_is_a_table(tmp_path, kind):
    write_tables(tmp_path, {"none": np.zeros((0, 4), np.float32), "some": np.ones((3, 4), np.float32)}, kind)
    for verify in ("quick", "all"):
        with open_store(tmp_path, verify=verify) as store:
            assert [table.spec.rows for table in store.tables] == [0, 3]
            assert list(store.tables[0].stream()) == []


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_taken_as_it_is(tmp_path, dtype):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), dtype)
    write_tables(tmp_path, {"t": values})
    with open_store(tmp_path) as store:
        (rows,) = store.tables[0].stream()
        np.testing.assert_array_equal(decode(rows, store.tables[0].spec.format), np.asarray(values.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        ([np.zeros((49, 4), np.float32)], ValueError, "table 't' has 50 rows, 49 came"),
        ([np.zeros((50, 4), np.float32)] * 2, ValueError, "table 't' has 50 rows, more came"),
        ([np.zeros((50, 3), np.float32)], ValueError, r"table 't': values: expected shape \[n, 4\]"),
        ([np.zeros(50, np.float32)], ValueError, r"expected arrays of rows \[n, 4\], got ndarray of shape \[50\]"),
        ([np.zeros((50, 4))], TypeError, "table 't': values: expected float32, got float64"),
        ([np.zeros((50, 4), np.int32)], TypeError, "table 't': values: expected float32, got int32"),
        ([np.zeros((50, 9), np.uint8)], ValueError, r"table 't': rows: expected shape \[..., 16\]"),
        ([np.full((50, 4), np.nan, np.float32)], ValueError, "table 't': values: row 0, column 0 is nan"),
        ([np.zeros((20, 4), np.float32), np.full((30, 16), 255, np.uint8)], ValueError, "rows: row 20 has a value"),
    ],
)
def test_rows_that_are_not_the_tables_are_refused_and_nothing_is_left(tmp_path, chunks, error, message):
    with pytest.raises(error, match=message), Writer(tmp_path) as writer:
        writer.add(SPEC, chunks)
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


@pytest.mark.parametrize(
    ("remap", "error", "message"),
    [
        ([0, 50], ValueError, r"remap: values 0 .. 50 of table 't', expected its rows, 0 .. 49, or -1"),
        ([-2, 0], ValueError, "remap: values -2 .. 0"),
        ([0.0], TypeError, "remap: expected integers"),
        ([[1]], TypeError, r"of shape \[1, 1\]"),
    ],
)
def test_a_remap_that_is_none_is_refused(tmp_path, remap, error, message):
    with pytest.raises(error, match=message), Writer(tmp_path) as writer:
        writer.add(SPEC, [np.zeros((50, 4), np.float32)], remap)


def test_a_writer_says_what_it_is_used_for_wrongly(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        Writer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="block: expected 512 or 4096, got 100"):
        Writer(tmp_path, block=100)
    with pytest.raises(ValueError, match="use it in a with statement"):
        Writer(tmp_path).add(SPEC, [])
    with Writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="the version has no table"):
            writer.publish()
        writer.add(SPEC, [np.zeros((50, 4), np.float32)])
        with pytest.raises(ValueError, match="there is a table 't' already"):
            writer.add(SPEC, [])
        with pytest.raises(ValueError, match="an error came before"):
            writer.publish()
    with Writer(tmp_path) as writer:
        writer.add(SPEC, [np.zeros((50, 4), np.float32)])
        writer.publish()
        with pytest.raises(ValueError, match="its version is published"):
            writer.publish()
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        _publish(tmp_path / "file", 1)


def test_leaving_without_publishing_leaves_nothing(tmp_path):
    _publish(tmp_path, 1)
    with Writer(tmp_path) as writer:
        writer.add(SPEC, [np.zeros((50, 4), np.float32)])
    assert {path.name for path in tmp_path.iterdir()} == {"CURRENT", "LOCK", "v000001"} and _value(tmp_path) == 1


def test_the_newest_versions_are_kept(tmp_path):
    for value in range(5):
        _publish(tmp_path, value, keep=3)
    assert versions(tmp_path) == ["v000003", "v000004", "v000005"]


def test_a_version_that_cannot_be_removed_is_a_warning_and_the_new_one_is_served(tmp_path):
    _publish(tmp_path, 1)
    disk = _Failing("rename", 3, errno.EACCES)
    with pytest.warns(UserWarning, match="v000002 is published, but v000001 could not be removed"):
        _publish(tmp_path, 2, disk)
    assert _value(tmp_path) == 2
    _publish(tmp_path, 3)
    assert versions(tmp_path) == ["v000003"]


def test_roll_back_serves_an_older_version_and_the_next_takes_the_place_of_the_newer(tmp_path):
    for value in (1, 2, 3):
        _publish(tmp_path, value, keep=3)
    roll_back(tmp_path, "v000002")
    assert _value(tmp_path) == 2
    assert _publish(tmp_path, 4, keep=3) == "v000003"
    assert versions(tmp_path) == ["v000001", "v000002", "v000003"] and _value(tmp_path) == 4
    with pytest.raises(NoStore):
        roll_back(tmp_path, "v000009")
    path = tmp_path / "v000001" / "00000.rows"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptTable):
        roll_back(tmp_path, "v000001")
    with Writer(tmp_path), pytest.raises(StoreBusy):
        roll_back(tmp_path, "v000002")


def test_what_is_not_ours_is_not_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "v1").mkdir()
    for value in (1, 2):
        _publish(tmp_path, value)
    assert {"notes.txt", "v1"} <= {path.name for path in tmp_path.iterdir()}


def test_tables_of_a_tree_are_written_by_their_paths(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "user": {"embedding": rng.normal(size=(9, 4)).astype(np.float32), "bias": np.zeros(9, np.float32)},
        "items": [jnp.asarray(rng.normal(size=(5, 2)), jnp.float32), jnp.zeros((3, 3, 3))],
    }
    tables = tables_of(tree)
    assert list(tables) == ["items/0", "user/embedding"]
    assert list(tables_of(tree, lambda path, leaf: "user/e" in path)) == ["user/embedding"]
    with pytest.raises(ValueError, match=r"select: 'items/1' has shape \[3, 3, 3\]"):
        tables_of(tree, lambda path, leaf: "items" in path)
    with pytest.raises(ValueError, match="no leaf is a table; there are a"):
        tables_of({"a": np.zeros(3)})
    write_tables(tmp_path, tables, {"items/0": "float16", "user/embedding": "int4"}, remaps={"items/0": [4, -1]})
    with open_store(tmp_path) as store:
        assert [(table.spec.name, table.spec.format.kind) for table in store.tables] == [
            ("items/0", "float16"),
            ("user/embedding", "int4"),
        ]
        assert store.tables[0].remap.tolist() == [4, -1]
        (rows,) = store.tables[1].stream()
        np.testing.assert_array_equal(rows, encode(tree["user"]["embedding"], RowFormat("int4", 4)))


def test_tables_come_one_at_a_time(tmp_path):
    alive = []

    def restored():
        for index in range(3):
            alive.append(index)
            yield f"t{index}", np.full((4, 2), index, np.float32)
            assert (pathlib.Path(tmp_path) / ".writing-v000001" / f"{index:05d}.rows").exists()

    write_tables(tmp_path, restored(), "bfloat16")
    assert alive == [0, 1, 2]
    for arguments, message in (
        ({"kind": {"a": "int8", "z": "int8"}}, "kind: no table z came"),
        ({"kind": {"z": "int8"}}, "kind: none for table 'a'"),
        ({"remaps": {"z": [0]}}, "remaps: no table z came"),
        ({"kind": "int5"}, "kind: 'int5' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tables(tmp_path, {"a": np.zeros((2, 2), np.float32)}, **arguments)
    with pytest.raises(ValueError, match=r"'a': expected an array \[R, D\], got \[2\]"):
        write_tables(tmp_path, {"a": np.zeros(2, np.float32)})
