"""Training the drafter on live traffic changes nothing but the time, whatever it learns."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.models.load import load
from kvarn.models.random_weights import RandomWeights
from kvarn.speculate.train.network import from_target, save
from kvarn.speculate.train.trainer import OnlineTrainer, Pace
from kvarn.speculate.train.updater import Weights
from kvarn.speculate.train.versions import Versions

DRAFTED = {"speculate": "draft", "draft_length": "fixed", "draft_tokens": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Any) -> dict[str, str]:
    """A tiny model with a tied embedding, a small drafter of it, and one that is its equal."""
    root = tmp_path_factory.mktemp("tied")
    target = root / "target"
    target.mkdir()
    plain = json.loads(Path(tiny_folder("llama"), "config.json").read_text())
    tied = plain | {"tie_word_embeddings": True}
    (target / "config.json").write_text(json.dumps(tied))
    model = load(resolve({"model": str(target), "load": "random", "dtype": "float32"}))
    weights = RandomWeights(0, 0.0, torch.float32, "cpu")
    for name, layers, ffn in (("small", [0], 32), ("equal", [0, 1, 2], 64)):
        network = from_target(model.spec, weights, layers, ffn)
        save(network, root / name, {})
    return {name: str(root / name) for name in ("target", "small", "equal")}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, str]) -> Any:
    requests = make_requests(24, seed=3)
    return requests, expected(make_engine(folders["target"]), requests)


def training(
    folders: dict[str, str], drafter: str, mode: str, **options: Any
) -> tuple[Engine, OnlineTrainer]:
    """An engine whose drafter learns quickly and is judged quickly."""
    engine = make_engine(
        folders["target"], draft_model=folders[drafter], train_drafter=mode, **DRAFTED, **options
    )
    assert engine.speculation is not None
    trainer = engine.speculation.trainer
    assert isinstance(trainer, OnlineTrainer)
    trainer.pace = Pace(interval=2, share=1.0, idle=mode == "idle")
    trainer.versions = Versions(window=8, margin=0.9)
    return engine, trainer


@pytest.mark.parametrize("mode", ["inline", "on"])
@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 7}, {"pages": 36}, {"overlap": "on"}, {"draft_shape": "tree"}],
)
def test_tokens_are_the_same_while_weights_change(
    folders: dict[str, str], wanted: Any, mode: str, options: dict[str, Any]
) -> None:
    requests, answers = wanted
    engine, trainer = training(folders, "small", mode, **options)
    seen = set()
    for attempt in range(20):  # a thread may need more than one go before its second update
        assert run(engine, requests, seed=attempt) == answers
        seen.add(trainer.versions.version)
        if trainer.versions.published >= 3:
            break
        if mode == "on":
            time.sleep(0.1)  # nobody asks for a while, which is when it learns
    assert trainer.failed == "" and trainer.versions.published >= 3
    stats = engine.stats()
    assert stats.trainer is not None and stats.drafted_tokens > 0
    assert stats.trainer.published == trainer.versions.published and stats.trainer.seconds > 0
    proposer: Any = engine.speculation and engine.speculation.proposer
    assert proposer.kv.check_integrity([]) == [] and engine.control.check_integrity() == []
    engine.close()
    assert not any(one.name.startswith("kvarn-trainer") for one in threading.enumerate())


def test_sampled_tokens_are_the_same_too(folders: dict[str, str]) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=20, seed=5)
    requests = [Request(f"s{i}", [3 + i, 8, i], sampling) for i in range(24)]
    plain = run(make_engine(folders["target"]), requests, seed=1)
    engine, trainer = training(folders, "small", "inline")
    assert run(engine, requests, seed=1) == plain
    assert trainer.versions.published >= 2


def test_an_inline_run_repeats_itself(folders: dict[str, str], wanted: Any) -> None:
    requests, _ = wanted
    found = []
    for _ in range(2):
        engine, trainer = training(folders, "small", "inline")
        run(engine, requests, seed=4)
        made = trainer.updates.weights()  # type: ignore[attr-defined]
        found.append((engine.stats().accepted_tokens, trainer.loss, made.tensors))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(x, found[1][2][name]) for name, x in found[0][2].items())


def test_garbage_costs_speed_only_and_is_taken_back(folders: dict[str, str], wanted: Any) -> None:
    requests, answers = wanted
    engine, trainer = training(folders, "equal", "inline", deterministic=True)
    trainer.pace = Pace(interval=1000)  # nothing is learnt: the drafter errs never, or always
    trainer.versions = Versions(window=40, margin=0.1)
    assert run(engine, requests, seed=1) == answers
    good, sound = engine.stats(), trainer.updates.weights()  # type: ignore[attr-defined]
    assert good.accepted_tokens > 0.9 * good.drafted_tokens and trainer.versions.ready
    garbage = {
        name: torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        for name, x in sound.tensors.items()
    }
    build: Any = trainer.updates
    trainer.publish(Weights(garbage, build.build(garbage)))
    assert trainer.versions.version == 1
    assert run(engine, requests, seed=2) == answers
    bad = engine.stats()
    assert trainer.versions.rolled_back == 1 and trainer.versions.version == 0
    assert bad.accepted_tokens - good.accepted_tokens < 0.9 * (
        bad.drafted_tokens - good.drafted_tokens
    )
    assert run(engine, requests, seed=3) == answers  # KV that garbage made is gone
    last = engine.stats()
    assert last.accepted_tokens - bad.accepted_tokens > 0.9 * (
        last.drafted_tokens - bad.drafted_tokens
    )


@pytest.mark.parametrize("keep", [True, False])
def test_swaps_in_every_step(folders: dict[str, str], wanted: Any, keep: bool) -> None:
    requests, answers = wanted
    engine, trainer = training(folders, "equal", "inline", pages=40)
    proposer: Any = engine.speculation and engine.speculation.proposer
    build: Any = trainer.updates
    sound = build.weights()
    noise = {name: x + 0.5 * torch.randn_like(x) for name, x in sound.tensors.items()}
    both, turn = (sound.decoder, build.build(noise)), 0
    step = engine.step

    def swapping() -> Any:
        nonlocal turn
        turn += 1
        proposer.renew(both[turn % 2], keep)
        return step()

    engine.step = swapping  # type: ignore[method-assign]
    assert run(engine, requests, seed=6) == answers
    assert proposer.kv.check_integrity([]) == [] and proposer.kv.held(0) == 0
    assert engine.stats().accepted_tokens > 0


@pytest.mark.parametrize("mode", ["inline", "on"])
def test_an_error_ends_the_training_and_nothing_else(
    folders: dict[str, str], wanted: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests, answers = wanted
    engine, trainer = training(folders, "small", mode)

    class Broken:
        def update(self, *_: Any) -> None:
            raise RuntimeError("out of chalk")

    trainer.updates = Broken()
    for seed in range(20):
        assert run(engine, requests, seed=seed) == answers
        if trainer.failed:
            break
    assert "out of chalk" in trainer.failed and "training of the drafter ends" in caplog.text
    assert run(engine, requests, seed=99) == answers
    stats = engine.stats().trainer
    assert stats is not None and "out of chalk" in stats.failed
    assert engine.assembly.runner.alternatives == 0  # type: ignore[attr-defined]
    engine.close()


def test_a_failure_during_a_trial_takes_the_version_back(
    folders: dict[str, str], wanted: Any
) -> None:
    requests, answers = wanted
    engine, trainer = training(folders, "small", "inline")
    assert run(engine, requests, seed=1) == answers
    trainer.versions = Versions(window=1 << 30)
    trainer.publish(trainer.updates.weights())  # type: ignore[attr-defined]
    trainer.worker.begin(lambda go_on: 1 / 0)  # type: ignore[arg-type]
    assert run(engine, requests, seed=2) == answers
    assert "ZeroDivisionError" in trainer.failed
    assert trainer.versions.version == 0 and trainer.versions.rolled_back == 1


def test_explain_and_parts_name_the_trainer(folders: dict[str, str]) -> None:
    engine, _ = training(folders, "small", "inline")
    found = engine.explain()
    assert [p["name"] for p in found["parts"] if p["kind"] == "trainer"] == ["online-spec"]
    (row,) = [row for row in found["options"] if row["option"] == "train_drafter"]
    assert row["value"] == "inline"


@pytest.mark.parametrize(
    "options, word",
    [
        ({"speculate": "ngram"}, "needs speculate=draft"),
        ({"speculate": "draft", "draft_model": "target"}, "model of its own"),
    ],
)
def test_what_cannot_learn_is_refused(
    folders: dict[str, str], options: dict[str, Any], word: str
) -> None:
    if "draft_model" in options:
        options = options | {"draft_model": folders[options["draft_model"]]}
    with pytest.raises(ConfigError, match=word):
        make_engine(folders["target"], train_drafter="on", **options)


def test_a_target_with_an_output_matrix_of_its_own_is_refused(
    tiny_folder: Any, folders: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="output matrix"):
        make_engine(
            tiny_folder("llama"), draft_model=str(Path(folders["small"])), train_drafter="on",
            **DRAFTED,
        )  # fmt: skip


def test_idle_learns_only_while_no_request_runs(folders: dict[str, str]) -> None:
    engine, trainer = training(folders, "small", "idle")
    told, tell, queues = list[bool](), trainer.worker.yields, engine.control.queues

    def heard(busy: bool) -> None:
        assert busy == bool(queues.waiting or queues.running)
        told.append(busy)
        tell(busy)

    trainer.worker.yields = heard  # type: ignore[method-assign]
    asked, ask = list[tuple[bool, int]](), trainer.ask

    def listened(count: int) -> None:
        asked.append((len(trainer.lessons) < trainer.pace.interval, count))
        ask(count)

    trainer.ask = listened
    run(engine, make_requests(8, seed=2), seed=0)
    assert trainer.failed == "" and told[-1] is False and any(told)
    assert not any(count for wanted, count in asked if not wanted)  # enough: steps keep nothing
    kept = [bool(count) for wanted, count in asked if wanted]
    assert 0 < sum(kept) <= len(kept) // trainer.pace.seldom + 1
    engine.close()


def test_it_learns_while_nobody_asks(folders: dict[str, str]) -> None:
    """The lessons of the last requests are learnt from when they have ended, without a step more,
    though the last step that was planned had others waiting."""
    engine, trainer = training(folders, "small", "on", max_seqs=1)
    run(engine, make_requests(3, seed=1), seed=0)
    assert not engine.has_work
    deadline = time.monotonic() + 60
    while not trainer.worker._job.done():  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "it waits for a step that does not come"
        time.sleep(0.01)
    assert trainer.worker._free.is_set()  # type: ignore[attr-defined]
    engine.close()
