import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from jaxeff import data
from jaxeff.data import archives, local, tfds


def _pretend_prepared(tmp_path, name, information, version="1.0.0"):
    folder = tmp_path / "tfds" / name / version
    folder.mkdir(parents=True)
    splits = {"splits": [{"name": "train"}, {"name": "test"}]}
    (folder / "dataset_info.json").write_text(json.dumps(splits | information))
    return folder


def test_our_checksums_are_those_of_tfds():
    import tensorflow_datasets

    folder = pathlib.Path(tensorflow_datasets.__file__).parent / "url_checksums"
    for name, files in archives.ARCHIVES.items():
        rows = [line.split("\t") for line in (folder / f"{name}.txt").read_text().splitlines()]
        assert sorted(files) == sorted((file, url, int(size), digest) for url, size, digest, file in rows)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100"])
def test_archives_prepared_offline_load_row_by_row(write_archives, manual, name):
    rows = write_archives(name)
    folder = data.prepare(name, manual)
    assert (folder / "dataset_info.json").is_file()
    for split in ("train", "test"):
        loaded = data.load(name, split)
        np.testing.assert_array_equal(loaded.arrays["image"], rows[split][0])
        np.testing.assert_array_equal(loaded.arrays["label"], rows[split][1])
        assert (loaded.arrays["image"].dtype, loaded.arrays["label"].dtype) == (np.uint8, np.int32)
        assert loaded.info.source == "tfds"
    assert "tensorflow" not in sys.modules


def test_tfds_itself_reads_what_we_prepare(write_archives, manual):
    import tensorflow_datasets

    rows = write_archives("fashion_mnist")
    source = tensorflow_datasets.builder_from_directory(str(data.prepare("fashion_mnist", manual))).as_data_source(
        "test"
    )
    assert len(source) == 12
    np.testing.assert_array_equal(source[5]["image"], rows["test"][0][5])
    assert source[5]["label"] == rows["test"][1][5]


def test_class_names_come_with_the_data(write_archives, manual):
    write_archives("cifar100")
    data.prepare("cifar100", manual)
    info = data.load("cifar100").info
    assert info.num_classes == 100
    assert info.class_names[42] == "class_42"


def test_prepared_digits_equal_the_embedded_ones():
    data.prepare("digits8x8")
    prepared, embedded = data.load("digits8x8", "test"), data.load("digits", "test")
    np.testing.assert_array_equal(prepared.arrays["image"], embedded.arrays["image"])
    np.testing.assert_array_equal(prepared.arrays["label"], embedded.arrays["label"])


def test_decoded_rows_are_kept(write_archives, manual, monkeypatch):
    write_archives("mnist")
    data.prepare("mnist", manual)
    first = data.load("mnist").arrays["image"]
    monkeypatch.setattr(tfds.np, "empty", None)  # Decoding would need it.
    np.testing.assert_array_equal(data.load("mnist").arrays["image"], first)


def test_files_come_before_prepared_directories(write_archives, manual, data_folder):
    write_archives("mnist")
    data.prepare("mnist", manual)
    blank = {"train_image": np.zeros((2, 28, 28), np.uint8), "train_label": np.zeros(2, np.uint8)}
    np.savez(data_folder / "mnist_20k.npz", **blank)
    assert data.load("mnist").info.source == "local"


def test_preparing_again_leaves_the_directory_as_it_is(write_archives, manual):
    write_archives("mnist")
    first = data.prepare("mnist", manual)
    stamp = (first / "dataset_info.json").stat().st_mtime_ns
    assert data.prepare("mnist") == first
    assert (first / "dataset_info.json").stat().st_mtime_ns == stamp


def test_data_dir_may_be_chosen(write_archives, manual, tmp_path):
    write_archives("mnist")
    assert data.prepare("mnist", manual, tmp_path / "other") == tmp_path / "other" / "mnist" / "3.0.1"


def test_wrong_checksum_prepares_nothing(write_archives, manual, tmp_path):
    write_archives("mnist")
    path = manual / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz has SHA-256 checksum .* expected"):
        data.prepare("mnist", manual)
    assert not (tmp_path / "tfds").exists()


def test_missing_archives_are_named(manual):
    with pytest.raises(FileNotFoundError, match="cifar-10-binary.tar.gz from https://www.cs.toronto.edu"):
        data.prepare("cifar10", manual)


def test_preparing_without_archives_and_network_fails():
    with pytest.raises(ConnectionError, match="no network"):
        data.prepare("mnist")


def test_answering_network_is_used(write_archives, manual, monkeypatch):
    rows = write_archives("mnist")

    def download(name, folder, answer_seconds):
        shutil.copytree(manual, folder)

    monkeypatch.setattr(archives, "download", download)
    np.testing.assert_array_equal(data.load("mnist").arrays["image"], rows["train"][0])


def test_unknown_name_lists_what_can_be_prepared():
    with pytest.raises(ValueError, match="digits8x8, mnist, fashion_mnist, kmnist, cifar10, cifar100"):
        data.prepare("imagenet")


def test_parquet_is_refused_with_the_reason(manual):
    with pytest.raises(ValueError, match="silently loses rows.*file_format='array_record'"):
        data.prepare("mnist", manual, file_format="parquet")


def test_tfrecord_is_refused(manual):
    with pytest.raises(ValueError, match="'tfrecord', which cannot be read at random without TensorFlow"):
        data.prepare("mnist", manual, file_format="tfrecord")


@pytest.mark.parametrize("name", ["mnist", "svhn_cropped"])
def test_directory_in_parquet_is_refused_with_the_reason(tmp_path, name):
    folder = _pretend_prepared(tmp_path, name, {"fileFormat": "parquet"})
    with pytest.raises(ValueError, match="silently loses rows") as error:
        data.load(name)
    assert str(folder) in str(error.value)


def test_existing_parquet_directory_is_not_taken_as_prepared(tmp_path, manual):
    _pretend_prepared(tmp_path, "mnist", {"fileFormat": "parquet"}, version="3.0.1")
    with pytest.raises(ValueError, match="silently loses rows"):
        data.prepare("mnist", manual)


def test_directory_without_a_format_counts_as_tfrecord(tmp_path):
    _pretend_prepared(tmp_path, "mnist", {})
    with pytest.raises(ValueError, match="tfrecord"):
        data.load("mnist")


def test_readable_version_is_preferred_to_a_newer_unreadable_one(write_archives, manual, tmp_path):
    write_archives("mnist")
    data.prepare("mnist", manual)
    _pretend_prepared(tmp_path, "mnist", {"fileFormat": "tfrecord"}, version="10.0.0")
    assert len(data.load("mnist")) == 30


def test_prepared_directory_of_any_other_classification_set_is_found_by_name(write_archives, manual, tmp_path):
    rows = write_archives("kmnist")
    shutil.move(data.prepare("kmnist", manual), tmp_path / "tfds" / "letters" / "curly" / "3.0.1")
    assert tfds.prepared_names() == ("letters/curly",)
    np.testing.assert_array_equal(data.load("letters/curly", "test").arrays["image"], rows["test"][0])
    with pytest.raises(ValueError, match="its splits: test, train|its splits: train, test"):
        data.load("letters/curly", "validation")


def test_unknown_name_also_lists_what_lies_prepared(tmp_path):
    _pretend_prepared(tmp_path, "letters", {"fileFormat": "array_record"})
    with pytest.raises(ValueError, match="prepared in .*: letters"):
        data.load("leters")


def test_prepared_set_without_images_is_refused(tmp_path):
    import tensorflow_datasets

    class Numbers(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            features = tensorflow_datasets.features.FeaturesDict({"number": np.int32})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"number": 1}

    Numbers(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match="cannot be read as a classification set"):
        data.load("numbers")


def test_without_tfds_the_extra_is_named(write_archives, manual, monkeypatch):
    write_archives("mnist")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"jaxeff\[data\]"):
        data.prepare("mnist", manual)


def test_without_tfds_a_missing_set_names_the_extra(monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(FileNotFoundError, match=r"3\. TFDS download: .*is not installed; .*jaxeff\[data\]"):
        data.load("mnist")


def test_default_folder_is_that_of_tfds(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert tfds.data_folder() == pathlib.Path.home() / "tensorflow_datasets"


def test_grey_info_is_shared_by_both_sources(write_archives, manual):
    write_archives("fashion_mnist")
    data.prepare("fashion_mnist", manual)
    assert data.load("fashion_mnist").info.class_names == local.FASHION_MNIST_INFO.class_names
