"""Compiled code is made once, found again, and its absence explained."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff.ops import native

CODE = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
ffi::Error Run(ffi::Buffer<ffi::F32> x, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  for (size_t i = 0; i < x.element_count(); ++i) y->typed_data()[i] = 2 * x.typed_data()[i];
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, Run, ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "twice.cc"
    path.write_text(CODE.replace("NAME", "TwiceInATest"))
    return path


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="there is no C++ compiler")


@needs_compiler
def test_a_file_is_compiled_once_and_called(source, monkeypatch):
    assert not native.compiled(source)
    native.register(source, "TwiceInATest")
    assert native.compiled(source) and native.reason(source, "TwiceInATest") is None
    twice = jax.ffi.ffi_call("TwiceInATest", jax.ShapeDtypeStruct((3,), jnp.float32), vmap_method="sequential")
    np.testing.assert_array_equal(twice(jnp.arange(3.0)), [0, 2, 4])
    # Another process finds what this one made, and needs no compiler.
    native._register.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.register(source, "TwiceInATest")


@needs_compiler
def test_a_file_that_does_not_compile_is_explained(source):
    source.write_text("not C++")
    with pytest.raises(native.UnavailableError, match=r"does not compile twice.cc: .*error"):
        native.register(source, "TwiceInATest")
    assert not native.compiled(source)


def test_a_missing_compiler_is_explained(source, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "no C++ compiler among c++, g++, clang++; install one, or name one by CXX" in native.reason(source, "Any")


def test_a_compiler_can_be_named(tmp_path, monkeypatch):
    (path := tmp_path / "named.cc").write_text(CODE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler among no-such-compiler" in native.reason(path, "NAME")


def test_a_damaged_library_is_explained(source):
    library = native._library(source)
    library.parent.mkdir()
    library.write_bytes(b"damaged")
    assert "cannot be made or loaded: " in native.reason(source, "Other")
    assert "remove it, or set JAXEFF_CACHE_DIR" in native.reason(source, "Other")


def test_it_can_be_switched_off(source, monkeypatch):
    monkeypatch.setenv("JAXEFF_NATIVE", "0")
    assert native.reason(source, "TwiceInATest") == "compiled code is switched off by JAXEFF_NATIVE=0"
    assert not native.compiled(source)
