"""Two and three ranks give the tokens of one; a rank that is lost ends the engine, by name."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden.checkpoints import CASES, PROMPT, checkpoint, loaded
from golden.naive import naive_generate
from golden.ranks import kept_ranks
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.errors import ConfigError, EngineDied
from kvarn.core.plan import StepPlan
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.runner import parallel


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[None]:
    with kept_ranks():
        yield


def tokens_of(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    found = run(engine, requests, seed=1)
    assert engine.control.check_integrity() == []
    engine.close()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("tp", [2, 3])
def test_tokens_equal_naive(tiny_folder: Any, family: str, tp: int) -> None:
    """Prefix hits, forks, preemption, chunks; three ranks share two KV heads."""
    folder, requests = tiny_folder(family), make_requests(8)
    one = make_engine(folder)
    answers = expected(one, requests)
    one.close()
    for budget, overlap, prefix in ((6, "off", "hash"), (64, "on", "radix")):
        engine = make_engine(folder, tp=tp, budget=budget, overlap=overlap, prefix=prefix, pages=30)
        found = run(engine, requests, seed=budget)
        stats = engine.stats()
        engine.close()
        assert found == answers
        assert stats.cached_tokens > 0
        assert stats.preemptions > 0 or engine.spec.windows  # windows give their pages back
        assert engine.control.check_integrity() == []


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_cut_right(case: str, tmp_path: Path) -> None:
    """Biases, tied embeddings, odd head sizes: from a real file, each rank reads its part."""
    pytest.importorskip("transformers")
    checkpoint(case, tmp_path)
    decoder, spec = loaded(tmp_path)
    wanted = naive_generate(decoder, spec, PROMPT, 8)
    engine = make_engine(str(tmp_path), tp=3, load="auto", pages=0, kv_memory=0.01)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert tokens_of(engine, [Request("r", PROMPT, sampling)]) == {("r", 0): wanted}


def test_samples_scores_and_embeddings_equal_one_rank(tiny_folder: Any) -> None:
    """Everything that is drawn or asked for beside tokens is the same, within rounding."""
    drawn = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_tokens=12, seed=7, n=2)
    rules = SamplingParams(temperature=1.0, repetition_penalty=1.2, max_tokens=12, seed=3)
    scored = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    requests = [
        Request("drawn", [3, 4, 5], drawn), Request("unseeded", [9, 9], SamplingParams()),
        Request("rules", [8, 1, 30], rules), Request("scored", list(range(3, 40)), scored),
        Request("embedded", list(range(30)), pooling="mean"),
    ]  # fmt: skip
    found: list[Any] = []
    for tp in (1, 2, 3):
        engine = make_engine(tiny_folder("gemma2"), tp=tp)
        tokens: dict[Any, list[int]] = {}
        numbers: dict[Any, list[float]] = {}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                key = (output.request_id, output.index)
                tokens.setdefault(key, []).extend(output.tokens)
                said = [e for e in output.prompt_logprobs or [] if e] + (output.logprobs or [])
                values = [entry.logprob for entry in said] + (output.embedding or [])
                numbers.setdefault(key, []).extend(values)
        engine.close()
        found.append((tokens, numbers))
    for tokens, numbers in found[1:]:
        assert tokens == found[0][0]
        for key, values in numbers.items():
            assert values == pytest.approx(found[0][1][key], abs=1e-4)


def test_smollm2_equals_naive() -> None:
    """The real model: 9 query heads in 3 KV groups, so two ranks hold 6 and 3."""
    options = {"load": "auto", "max_len": 96, "threads": 2, "page_size": 16}
    engine = make_engine("smollm2-135m", tp=2, **options)
    ids = engine.tokenizer.encode("The capital of France is")
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    found = tokens_of(engine, [Request("r", ids, sampling)])
    one = make_engine("smollm2-135m", **options)
    wanted = naive_generate(one.assembly.model.decoder, one.spec, ids, 8, one.spec.eos_ids)
    assert found == {("r", 0): wanted}
    assert "Paris" in one.tokenizer.decode(wanted)


def test_pages_and_explain_by_rank(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), tp=3, pages=0, kv_memory=0.0001)
    alone = make_engine(tiny_folder("llama"), pages=0, kv_memory=0.0001)
    # a rank holds one of two KV heads, so the same memory a rank has twice the pages
    assert engine.resolved.config.pages // 2 == alone.resolved.config.pages
    rows = engine.explain()["ranks"]
    assert [row["query heads"] for row in rows] == ["0", "1", "2 to 3"]
    assert [row["kv heads"] for row in rows] == ["0", "0", "1"]
    assert all(row["weights (GiB)"] >= 0 for row in rows)
    assert alone.explain()["ranks"] == []
    engine.close()


def test_what_cannot_be_shared_is_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"tp=5 is more .* tp=4 is the most"):
        make_engine(tiny_folder("llama"), tp=5)
    with pytest.raises(ConfigError, match="'tp' must be at least 1"):
        make_engine(tiny_folder("llama"), tp=0)


def test_a_step_that_fails_everywhere_ends_its_requests_alone(tiny_folder: Any) -> None:
    """A plan that no rank can carry out: its requests get the error, the ranks stay in step."""
    engine = make_engine(tiny_folder("llama"), tp=3)
    requests = make_requests(3)
    wrong = StepPlan(999, spans=[_span_of_nobody()])
    with pytest.raises(KeyError):
        engine.executor.run(wrong)
    with pytest.raises(KeyError):
        engine.executor.launch(wrong).result()
    answers = expected(make_engine(tiny_folder("llama")), requests)
    assert tokens_of(engine, requests) == answers


def _span_of_nobody() -> Any:
    from kvarn.core.plan import Span

    return Span(seq=12345, start=0, length=1)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_rank_that_fails_alone_is_named(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Rank 0 raises in the middle of a step and the others wait for it: no hang, no guessing."""
    monkeypatch.setattr(parallel, "GRACE", 0.3)
    engine = make_engine(tiny_folder("llama"), tp=3, overlap=overlap)
    engine.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=4)))

    def broken(*args: Any) -> None:
        raise MemoryError("no room on this rank")

    monkeypatch.setattr(engine.assembly.model.decoder.layers[1], "down", broken)
    with pytest.raises(EngineDied, match=r"no room on this rank.*rank 1, 2 did not say so"):
        while engine.has_work:
            engine.step()
    with pytest.raises(EngineDied):
        engine.executor.run(StepPlan(5))
    engine.close()


@pytest.mark.parametrize("at", ["idle", "in a step"])
def test_a_rank_that_dies_is_named(tiny_folder: Any, at: str) -> None:
    engine = make_engine(tiny_folder("llama"), tp=3)
    engine.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=64, ignore_eos=True)))
    engine.step()
    victim = engine.executor.ranks.workers[1].process.pid
    if at == "idle":
        os.kill(victim, signal.SIGKILL)
    else:
        os.kill(victim, signal.SIGSTOP)  # the others wait for it in a collective, then it ends
        threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(EngineDied, match=rf"rank 2 \(process {victim}\) was ended by SIGKILL"):
        while engine.has_work:
            engine.step()
    engine.close()


def test_a_rank_that_is_silent_is_named(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "LIMIT", 1.5)
    monkeypatch.setattr(parallel, "GRACE", 0.5)
    engine = make_engine(tiny_folder("llama"), tp=2)
    engine.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=64, ignore_eos=True)))
    engine.step()
    os.kill(engine.executor.ranks.workers[0].process.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match="rank 1 did not say so"):
        while engine.has_work:
            engine.step()
    engine.close()
