"""benchmarks/validate_pipeline.py: a tiny real pipeline is served whole and predicted."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import validate_pipeline as script


def test_a_tiny_pipeline_is_served_and_predicted(tiny_folder, tmp_path, monkeypatch):
    options = {"model": tiny_folder("llama"), "load": "random", "dtype": "float32", "pages": 400,
               "max_len": 300}  # fmt: skip
    monkeypatch.setattr(script, "OPTIONS", options)
    monkeypatch.setattr(script, "TOKENS", (0, 90))
    for name, value in (("VECTORS", 500), ("REQUESTS", 12), ("REPEATS", 1), ("RATE", 50.0)):
        monkeypatch.setattr(script, name, value)
    found = script.validate(tmp_path)
    assert found["search_ms"] > 0
    assert [row["measure"] for row in found["results"]] == ["E2E mean", "E2E p95"]
    for row in found["results"]:
        assert row["measured"] > 0 and row["error"] == pytest.approx(
            row["predicted"] / row["measured"] - 1
        )
