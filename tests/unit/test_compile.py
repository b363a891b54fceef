"""Shared libraries from C++: several sources, kept once built, and what is said meanwhile."""

import ctypes
import logging
import shutil

import pytest

from kvarn.kernels.compile import BuildError, shared_library

FLAGS = ("-O1", "-fPIC")
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    one, two = tmp_path / "one.cpp", tmp_path / "two.cpp"
    one.write_text('int half(); extern "C" int whole() { return 2 * half(); }')
    two.write_text("int half() { return 21; }")
    return [one, two]


def test_sources_become_one_library_which_is_kept(sources, caplog):
    with caplog.at_level(logging.WARNING, logger="kvarn.compile"):
        built = shared_library("answer", sources, FLAGS)
    assert ctypes.CDLL(str(built.path)).whole() == 42 and built.seconds > 0
    (said,) = caplog.messages
    assert "compiling answer" in said and str(built.path.parent) in said
    caplog.clear()
    again = shared_library("answer", sources, FLAGS)
    assert again.path == built.path and again.seconds == 0 and not caplog.messages
    assert [one.name for one in built.path.parent.iterdir()] == [built.path.name]


def test_a_change_of_a_source_is_another_library(sources):
    first = shared_library("answer", sources, FLAGS)
    sources[1].write_text("int half() { return 22; }")
    assert shared_library("answer", sources, FLAGS).path != first.path


def test_a_source_that_does_not_compile_is_named(sources, tmp_path):
    sources[1].write_text("int half() { return nonsense; }")
    with pytest.raises(BuildError, match="nonsense"):
        shared_library("answer", sources, FLAGS)
    assert not list((tmp_path / "cache" / "native").iterdir())
