"""The decisions run without torch and numpy: the simulator stands on this."""

import subprocess
import sys
import textwrap

LEFT = """
    import sys
    for name in ("torch", "numpy", "triton"):
        sys.modules[name] = None
    import importlib.util, pathlib
    root = pathlib.Path(importlib.util.find_spec("kvarn").origin).parent
    left = ["core", "cost", "theory", "workload", "schedule", "kv/prefix", "kv/evict",
            "cluster/router", "sim", "speculate/length"]
    names = ["kvarn.kv.manager", "kvarn.kv.sizing", "kvarn.cluster.fleet", "kvarn.cluster.routing"]
    names += ["kvarn.speculate.speculation", "kvarn.speculate.train.versions"]
    drafts = ("mix", "native_tree", "ngram", "suffix")
    names += [f"kvarn.speculate.propose.{name}" for name in drafts]
    for folder in left:
        for file in sorted((root / folder).glob("*.py")):
            module = "kvarn." + folder.replace("/", ".")
            names.append(module if file.stem == "__init__" else f"{module}.{file.stem}")
    for name in names:
        importlib.import_module(name)
    print(len(names))
"""


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_left_side_imports_without_torch() -> None:
    assert int(run(LEFT)) > 20


def test_import_kvarn_is_light() -> None:
    code = """
        import sys, kvarn
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        print(len(sys.modules))
    """
    assert int(run(code)) < 200


def test_offline_engine_needs_no_server_library() -> None:
    code = """
        import sys
        import kvarn.engine.llm
        servers = {"fastapi", "uvicorn", "pydantic", "prometheus_client", "msgspec", "typer",
                   "rich", "llguidance", "huggingface_hub", "gguf"}
        print(sorted(servers & set(sys.modules)))
    """
    assert run(code) == "[]"
