"""Every sparsity part x what can happen to a request: its tokens are those it gets alone."""

from typing import Any

import pytest

from kvarn.core.config import resolve
from kvarn.core.errors import RequestError
from kvarn.core.part import find, known
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.sparse.part import Selector

PARTS = sorted(name for kind, name in known() if kind == "sparsity")
#: the tiny model has no more layers; a prompt's last tokens go on beside its first
MORE = {"pyramid": ",steps=3", "gemfilter": ",recent=8,layer=1"}
SELECTORS = [name for name in PARTS if issubclass(find("sparsity", name), Selector)]
#: those whose table groups hold every request of the engine
FIXED = [name for name in PARTS if find("sparsity", name).fixed]  # type: ignore[attr-defined]
SYSTEM = [(5 * i * i + i) % 97 for i in range(40)]
PROMPTS = [SYSTEM + [(11 * i * j + 3 * j) % 97 for j in range(10 + 17 * i)] for i in range(1, 6)]


def rule(name: str) -> str:
    """The part with a budget below every prompt but the shortest."""
    if name in FIXED:
        return f"{name}:by=random,window=28,sinks=4"
    if name in SELECTORS:
        return f"{name}:budget=48,dense=1"
    return f"{name}:budget=32,sinks=4{MORE.get(name, '')}"


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


#: other pages are another choice to those who choose pages
PAIRS = [(n, c) for n in PARTS for c in CASES if not (n in SELECTORS and c == "large pages")]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_tokens_are_those_of_a_request_alone(
    tiny_folder: Any, alone: Any, name: str, case: str
) -> None:
    spec = rule(name)
    engine = make_engine(tiny_folder("llama"), sparsity=spec, **CASES[case])
    assert run(engine, PROMPTS) == alone(spec)
    assert run(engine, PROMPTS) == alone(spec), "with the prefixes of the first time"


#: what goes on of a prompt loses some again
CHAINED = "gemfilter:budget=48,sinks=4,recent=8,layer=1,then=snapkv,stays=24"
#: choices that serve other rows too; a page of 4 takes three of 2, or 3 and 1
SHARED = ["quest:budget=48,dense=1,reuse=3", "random-pages:budget=48,dense=1,reuse=2"]


@pytest.mark.parametrize("case", [case for case in CASES if case != "large pages"])
@pytest.mark.parametrize("spec", SHARED)
def test_shared_choices_are_those_of_a_request_alone(
    tiny_folder: Any, alone: Any, spec: str, case: str
) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity=spec, **CASES[case])
    assert run(engine, PROMPTS) == alone(spec)
    assert run(engine, PROMPTS) == alone(spec), "with the prefixes of the first time"
    every = spec.partition(",reuse")[0]
    assert run(engine, PROMPTS, sparsity=every) == alone(every), "beside the memory of the others"
    assert alone(every) != alone(spec)


OTHERS = [
    "knorm:budget=32,sinks=4,every=8",
    "h2o:budget=32,every=8",
    "duoattention:by=random,window=28,sinks=4,of=snapkv,budget=60",
    CHAINED,
    *SHARED,
]


@pytest.mark.parametrize("spec", [*map(rule, PARTS), *OTHERS])
def test_preempted_requests_keep_the_same_again(tiny_folder: Any, alone: Any, spec: str) -> None:
    """Growing dense requests drive others out, one of them in the middle of its output."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=spec, pages=54, budget=48, prefix="none", max_len=184
    )
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    dense = None if spec.partition(":")[0] in FIXED else "none"
    for i in range(4):
        engine.add(Request(f"dense{i}", SYSTEM[: 10 + i], params, sparsity=dense))
    found = run(engine, PROMPTS)
    assert engine.control.stats().preemptions > 0
    assert {seq: tokens for seq, tokens in found.items() if seq[0] == "r"} == alone(spec)


@pytest.mark.parametrize(
    "spec",
    [
        CHAINED,
        *(
            rule(name) if name in FIXED else f"{name}:budget=48{MORE.get(name, '')}"
            for name in PARTS
        ),
    ],
)
def test_siblings(tiny_folder: Any, alone: Any, spec: str) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity=spec)
    assert run(engine, PROMPTS, n=3) == alone(spec, 3)


@pytest.mark.parametrize("name", [n for n in PARTS if n not in ("pyramid", *FIXED, *SELECTORS)])
def test_requests_choose(tiny_folder: Any, alone: Any, name: str) -> None:
    """Each request its own, on one engine; and none where the engine has one."""
    spec = f"{name}:budget=48{MORE.get(name, '')}"
    engine = make_engine(tiny_folder("llama"))
    assert run(engine, PROMPTS, sparsity=spec) == alone(spec)
    assert run(engine, PROMPTS) == alone("none")
    engine = make_engine(tiny_folder("llama"), sparsity=spec)
    assert run(engine, PROMPTS, sparsity="none") == alone("none")


@pytest.mark.parametrize("name", SELECTORS)
def test_requests_choose_how_much_they_see(tiny_folder: Any, alone: Any, name: str) -> None:
    """An engine with bounds beside its pages: each request a budget of its own, or none."""
    engine = make_engine(tiny_folder("llama"), sparsity=f"{name}:budget=200,dense=2")
    assert run(engine, PROMPTS, sparsity=rule(name)) == alone(rule(name))
    assert run(engine, PROMPTS, sparsity="none") == alone("none")
    assert run(engine, PROMPTS, sparsity="snapkv:budget=32,sinks=4") == alone(rule("snapkv"))


def test_one_keeps_while_another_chooses(tiny_folder: Any, alone: Any) -> None:
    """In the same steps, and each as alone."""
    specs = [rule("quest"), rule("snapkv"), "none"]
    engine = make_engine(tiny_folder("llama"), sparsity=rule("quest"), prefix="none")
    for i, prompt in enumerate(PROMPTS):  # not all at once: prompts meet what is generated
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, seed=i)
        engine.add(Request(f"r{i}", prompt, params, sparsity=specs[i % 3]))
        engine.step()
    found: dict[str, list[int]] = {f"r{i}.0": [] for i in range(len(PROMPTS))}
    while engine.has_work:
        for out in engine.step():
            found[f"{out.request_id}.{out.index}"] += out.tokens
    for i in range(len(PROMPTS)):
        wanted = alone(specs[i % 3])[f"r{i}.0"]
        assert found[f"r{i}.0"] == wanted[-len(found[f"r{i}.0"]) :]


@pytest.mark.parametrize("name", FIXED)
def test_what_holds_every_request_cannot_be_left(tiny_folder: Any, name: str) -> None:
    """Nor taken up where the engine has other table groups."""
    engine = make_engine(tiny_folder("llama"), sparsity=rule(name))
    with pytest.raises(RequestError, match="start an engine without"):
        engine.add(Request("r", PROMPTS[0], sparsity="none"))
    engine = make_engine(tiny_folder("llama"))
    with pytest.raises(RequestError, match=f"start it with sparsity={name}"):
        engine.add(Request("r", PROMPTS[0], sparsity=rule(name)))


@pytest.mark.parametrize("spec", [*map(rule, [*SELECTORS, *FIXED, "gemfilter"]), *SHARED])
@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
@pytest.mark.parametrize("longest", [3, 7])
def test_drafts_change_nothing(
    tiny_folder: Any, alone: Any, spec: str, proposer: str, longest: int
) -> None:
    """A page that a rejected draft has filled is bounded anew; what it chose is forgotten."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=spec, speculate=proposer, draft_tokens=longest,
        draft_length="fixed",
    )  # fmt: skip
    assert run(engine, PROMPTS) == alone(spec)
    assert run(engine, PROMPTS) == alone(spec), "with what was learnt"
    assert engine.control.stats().drafted_tokens > 0
