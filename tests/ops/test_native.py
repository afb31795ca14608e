"""Compiled code is made once, found again, and its absence explained."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeff import dynamic
from jaxeff.ops import choice, native

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
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native._load.__wrapped__(source)["TwiceInATest"]
    # What is loaded stays, whichever folder is named later.
    monkeypatch.setenv("JAXEFF_CACHE_DIR", str(source.parent / "other"))
    assert native.compiled(source) and native.reason(source, "TwiceInATest") is None


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


@needs_compiler
def test_a_damaged_library_is_made_again(source):
    source.write_text(CODE.replace("NAME", "DamagedInATest"))
    library = native._library(source)
    library.parent.mkdir()
    library.write_bytes(b"damaged")
    assert native.reason(source, "DamagedInATest") is None and library.stat().st_size > 100


@needs_compiler
def test_a_symbol_that_is_not_there_is_explained(source):
    assert "undefined symbol: Missing" in native.reason(source, "Missing")


@needs_compiler
def test_the_next_compiler_is_tried_and_a_named_one_may_have_options(source, tmp_path, monkeypatch):
    (broken := tmp_path / "broken").write_text("#!/bin/sh\necho too old >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{broken} --option")
    assert "broken does not compile twice.cc: too old" in native.reason(source, "TwiceInATest")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(native, "COMPILERS", (str(broken), *native.COMPILERS))
    library = native._library(source)
    assert native._compile(source, library) is None and library.exists()


def test_a_cache_that_cannot_be_had_is_no_error_for_who_does_not_need_it(source, monkeypatch):
    def unreadable(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(native.pathlib.Path, "exists", unreadable)
    assert not native.compiled(source)
    assert "cannot be made or loaded: not yours; set JAXEFF_CACHE_DIR" in native.reason(source, "TwiceInATest")
    monkeypatch.delenv("JAXEFF_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not native.compiled(source)


def test_programs_of_several_devices_are_left_whole(source, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "XLA does not divide compiled code over 8 devices" in native.reason(source, "TwiceInATest")


@needs_compiler
def test_code_of_the_host_is_called_without_xla(tmp_path, monkeypatch):
    (path := tmp_path / "plain.cc").write_text('extern "C" int PlainInATest(int x) { return 2 * x; }')
    assert native.load(path).PlainInATest(21) == 42
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # which matters to programs of XLA's alone
    assert native.load(path).PlainInATest(4) == 8
    with native.off(), pytest.raises(native.UnavailableError, match="switched off"):
        native.load(path)


def test_it_can_be_switched_off(source, monkeypatch):
    monkeypatch.setenv("JAXEFF_NATIVE", "0")
    assert native.reason(source, "TwiceInATest") == "compiled code is switched off by JAXEFF_NATIVE=0"
    assert not native.compiled(source)
    monkeypatch.delenv("JAXEFF_NATIVE")
    with native.off():
        assert native.reason(source, "TwiceInATest") == "compiled code is switched off by jaxeff.ops.native.off"
        assert not native.compiled(source)


@pytest.mark.skipif(bool(missing := choice.unavailable()), reason=str(missing))
def test_programs_for_other_processes_are_traced_without_it():
    x = jnp.ones((2, 4, 4, 8))
    gated = lambda x: dynamic.channel_attention(x)
    assert "MeanOverPositions" in str(jax.make_jaxpr(gated)(x))
    with native.off():
        assert "ffi_call" not in str(jax.make_jaxpr(gated)(x))
        jax.export.export(jax.jit(gated))(x)
