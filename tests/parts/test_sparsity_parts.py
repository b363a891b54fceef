"""Every sparsity part x what can happen to a request: its tokens are those it gets alone."""

from typing import Any

import pytest

from kvarn.core.config import resolve
from kvarn.core.part import known
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

PARTS = sorted(name for kind, name in known() if kind == "sparsity")
MORE = {"pyramid": ",steps=3"}  #: the tiny model has no more layers
SYSTEM = [(5 * i * i + i) % 97 for i in range(40)]
PROMPTS = [SYSTEM + [(11 * i * j + 3 * j) % 97 for j in range(10 + 17 * i)] for i in range(1, 6)]


def make_engine(folder: str, **options: Any) -> Engine:
    given = {
        "model": folder, "load": "random", "dtype": "float32", "pages": 400, "page_size": 4,
        "max_len": 300, "budget": 256, "max_seqs": 8,
    }  # fmt: skip
    return Engine(resolve(given | options))


def run(engine: Engine, prompts: list[list[int]], **fields: Any) -> dict[str, list[int]]:
    """Greedy tokens by sequence; the books must be in order at the end."""
    n = fields.pop("n", 1)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=30, temperature=0.0 if n == 1 else 0.8, ignore_eos=True, n=n, seed=i
        )
        engine.add(Request(f"r{i}", prompt, params, **fields))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for out in engine.step():
            found.setdefault(f"{out.request_id}.{out.index}", []).extend(out.tokens)
    assert engine.control.check_integrity() == []
    assert engine.control.kv.held(0) == 0
    return found


@pytest.fixture(scope="module")
def alone(tiny_folder: Any) -> Any:
    """Tokens of each prompt in an engine of its own, by part and n."""
    found: dict[tuple[str, int], dict[str, list[int]]] = {}

    def tokens(spec: str, n: int = 1) -> dict[str, list[int]]:
        if (spec, n) not in found:
            together = {}
            for i, prompt in enumerate(PROMPTS):
                engine = make_engine(tiny_folder("llama"), sparsity=spec, prefix="none")
                # the place among the requests decides the seed
                blanks: list[list[int]] = [[1]] * i
                mine = run(engine, [*blanks, prompt], n=n)
                together |= {k: v for k, v in mine.items() if k.startswith(f"r{i}.")}
            found[spec, n] = together
        return found[spec, n]

    return tokens


CASES: dict[str, dict[str, Any]] = {
    "chunks of 24": {"budget": 24},
    "chunks of 9": {"budget": 9},
    "orca": {"scheduler": "orca", "budget": 64},
    "prefill first": {"scheduler": "prefill-first", "budget": 64},
    "overlap": {"overlap": "on", "budget": 48},
    "radix": {"prefix": "radix"},
    "large pages": {"page_size": 16, "pages": 100},
    "bare torch": {"attention": "cpu"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PARTS)
def test_tokens_are_those_of_a_request_alone(
    tiny_folder: Any, alone: Any, name: str, case: str
) -> None:
    spec = f"{name}:budget=32,sinks=4{MORE.get(name, '')}"
    engine = make_engine(tiny_folder("llama"), sparsity=spec, **CASES[case])
    assert run(engine, PROMPTS) == alone(spec)
    assert run(engine, PROMPTS) == alone(spec), "with the prefixes of the first time"


@pytest.mark.parametrize("name", PARTS)
def test_preempted_requests_keep_the_same_again(tiny_folder: Any, alone: Any, name: str) -> None:
    """Growing dense requests drive others out, one of them in the middle of its output."""
    spec = f"{name}:budget=32,sinks=4{MORE.get(name, '')}"
    engine = make_engine(
        tiny_folder("llama"), sparsity=spec, pages=54, budget=48, prefix="none", max_len=184
    )
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    for i in range(4):
        engine.add(Request(f"dense{i}", SYSTEM[: 10 + i], params, sparsity="none"))
    found = run(engine, PROMPTS)
    assert engine.control.stats().preemptions > 0
    assert {seq: tokens for seq, tokens in found.items() if seq[0] == "r"} == alone(spec)


@pytest.mark.parametrize("name", PARTS)
def test_siblings(tiny_folder: Any, alone: Any, name: str) -> None:
    spec = f"{name}:budget=48{MORE.get(name, '')}"
    engine = make_engine(tiny_folder("llama"), sparsity=spec)
    assert run(engine, PROMPTS, n=3) == alone(spec, 3)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "pyramid"])
def test_requests_choose(tiny_folder: Any, alone: Any, name: str) -> None:
    """Each request its own, on one engine; and none where the engine has one."""
    spec = f"{name}:budget=48{MORE.get(name, '')}"
    engine = make_engine(tiny_folder("llama"))
    assert run(engine, PROMPTS, sparsity=spec) == alone(spec)
    assert run(engine, PROMPTS) == alone("none")
    engine = make_engine(tiny_folder("llama"), sparsity=spec)
    assert run(engine, PROMPTS, sparsity="none") == alone("none")
