"""What drafts without a model bring on a GPU, with acceptance that was recorded from a real model.

    PYTHONPATH=. python benchmarks/gpu/recorded_drafts.py [--model llama-3.1-8b] [--batches 1,32]
                                                          [--agents N] [--turns N] [--json FILE]
    python benchmarks/gpu/recorded_drafts.py --record benchmarks/traces/edits_smollm2.json.gz

The recording: SmolLM2-135M plays agents that regenerate a small file with one edit a turn. What it
said is kept token by token, whether it did what it was asked or not. Conversations of which an
answer did not end by itself are left out: most of them go round in a loop, which any proposer
drafts.

The measurement: a larger shape with random weights serves the recorded requests, and each token
that the device has chosen becomes the recorded one before the engine looks at it. So the proposers
see the real text, a draft stands where it is what the model said, and the device computes every
step as it would. Random weights: speed; acceptance recorded. The output must be the recording.
Times are from end to end, with the prompts; of a conversation's later turns most of the prompt is
cached.

Plain decoding and every setting of both proposers serve the same requests with one engine, in
turns. Each run begins with a new proposer and an empty cache; what steps cost is learnt once, by
setting (`survival`). Runs in which a step was captured do not count. A batch is full at first only:
answers are of unlike lengths, and the next turn begins when all have ended. Putting the recorded
tokens in place takes the host 0.2 us each, which plain decoding hides behind its steps, and
verification does not.

What it cannot say: how far an 8B model would repeat its files. It should do so more faithfully than
one of 135M, which now and then loses its way; that would make drafts stand more often.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.bench.edits import OUTPUT, TURNS, Agent, Turn, conversations
from kvarn.core.errors import ConfigError
from kvarn.core.plan import SeqId
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced
from kvarn.engine.llm import LLM
from kvarn.runner.inflight import InFlight
from kvarn.runner.sampler import Sampled
from kvarn.speculate.build import build_speculation, suffix_trees
from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import LengthControl

BENCHMARKS = Path(__file__).resolve().parents[1]
TRACE = BENCHMARKS / "traces" / "edits_smollm2.json.gz"
SMOLLM2 = Path("~/.cache/kvarn/models/SmolLM2-135M-Instruct.Q4_1.gguf").expanduser()

AGENTS = 40  #: conversations of the recording
TOGETHER = 32  #: agents recorded at once
RUN = 4  #: tokens in a row that occur in the prompt count as repeated

PROPOSERS = ("suffix", "ngram")
#: tokens: with the one that they follow, 1 and 32 sequences fill buckets of captured verify steps
LENGTHS = (3, 7, 15)
REPEATS, TRIES = 2, 4  #: runs of a setting that count, and that are made at most
LOOKUPS = (2048, 8192, 32768, 65536)  #: prompts that n-grams are looked up in [tokens]
COUNTS = (
    "output_tokens", "prompt_tokens", "cached_tokens", "steps", "drafted_tokens",
    "accepted_tokens", "verify_steps", "replayed_verify_steps",
)  # fmt: skip

# the recording


def record_agents(path: Path, model: str, wanted: int) -> None:
    """Record until there are so many agents, and write them; ids of tokens only."""
    llm = LLM(model=model, max_len=2048, max_seqs=TOGETHER)
    agents, tried = list[Agent](), 0
    while len(agents) < wanted:
        agents += conversations(llm, range(tried, tried + TOGETHER))
        tried += TOGETHER
        print(f"{len(agents)} of {tried} agents", flush=True)
    llm.close()
    agents = agents[:wanted]
    said = {"turns": TURNS, "longest_answer": OUTPUT, "tried": tried}
    header = record.header("recorded_edits", said, {"model": Path(model).stem})
    found = {"statistics": statistics(agents), "agents": [[asdict(t) for t in a] for a in agents]}
    print(found["statistics"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(header | found).encode(), mtime=0))


def statistics(agents: Sequence[Agent]) -> dict[str, Any]:
    """How much was recorded, and how much of the answers repeats what stands before them."""
    every, turns = [turn for agent in agents for turn in agent], len(agents[0])
    return {
        "agents": len(agents),
        "requests": len(every),
        "prompt_tokens": sum(len(turn.prompt) for turn in every),
        "answer_tokens": sum(len(turn.answer) for turn in every),
        "repeated": [fmean(repeated(turn) for turn in at) for at in zip(*agents)],
        "unchanged": [fmean(unchanged(agent, at) for agent in agents) for at in range(1, turns)],
    }


def repeated(turn: Turn) -> float:
    """Share of an answer's tokens that are part of `RUN` tokens that its prompt has too."""
    prompt, answer = turn.prompt, turn.answer
    known = {tuple(prompt[i : i + RUN]) for i in range(len(prompt) - RUN + 1)}
    places = set[int]()
    for i in range(len(answer) - RUN + 1):
        if tuple(answer[i : i + RUN]) in known:
            places |= set(range(i, i + RUN))
    return len(places) / len(answer)


def unchanged(agent: Agent, at: int) -> bool:
    """Whether an answer is the one before it, without an edit."""
    return agent[at].answer == agent[at - 1].answer


def load(path: Path) -> list[Agent]:
    """What `record_agents` wrote."""
    found = json.loads(gzip.decompress(path.read_bytes()))
    return [[Turn(**turn) for turn in agent] for agent in found["agents"]]


# the measurement


@contextmanager
def teaching(texts: dict[SeqId, list[int]]) -> Iterator[None]:
    """Inside, what the device chooses becomes what `texts` say, prompts and answers by sequence.

    A fault of the logits stays one; a sequence without a text is left alone.
    """
    settle = InFlight.settle

    def recorded(self: InFlight, sampled: Sampled) -> None:
        batch = self.batch
        assert batch is not None
        # without drafts a row may have changed hands since the step was handed over
        owners = self.image.owner[batch.rows[batch.logits_spans]] if batch.drafts else self.owners
        rows = zip(owners.tolist(), batch.lengths.tolist(), sampled.tokens, strict=True)
        sampled.tokens = [
            texts[seq][at] if token >= 0 and seq in texts and at < len(texts[seq]) else token
            for seq, at, token in rows
        ]
        settle(self, sampled)

    InFlight.settle = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        InFlight.settle = settle  # type: ignore[method-assign]


def serve(engine: Engine, turns: Sequence[Turn]) -> None:
    """Serve these requests together; raises where an output is not what was recorded."""
    found, texts = defaultdict[str, list[int]](list), dict[SeqId, list[int]]()
    for at, turn in enumerate(turns):
        params = SamplingParams(temperature=0, max_tokens=len(turn.answer), ignore_eos=True)
        engine.add(Request(str(at), turn.prompt, params, arrival=engine.clock()))
        texts[max(engine.control.seqs)] = turn.prompt + turn.answer  # numbers of sequences rise
    with teaching(texts), paced() as stepped:
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.tokens
            stepped()
    for at, turn in enumerate(turns):
        if found[str(at)] != turn.answer:
            raise AssertionError(f"request {at} did not give what was recorded")


@dataclass(slots=True)
class Setting:
    """A way to draft, and what its control has learnt."""

    proposer: str  #: "": plain decoding
    control: LengthControl
    name: str  #: of the control
    most: int  #: longest draft [tokens]
    costs: Measured = field(default_factory=Measured)


@dataclass(slots=True)
class Run:
    """One setting has served all requests once."""

    seconds: float
    captures: int  #: steps that were captured meanwhile
    counts: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Output rate."""
        return self.counts["output_tokens"] / self.seconds


def settings(proposers: Sequence[str], lengths: Sequence[int]) -> list[Setting]:
    """Plain decoding first: the others are held against it."""
    found = [Setting("", Fixed(), "plain", 0)]
    for proposer in proposers:
        found += [Setting(proposer, Fixed(), f"fixed {most}", most) for most in lengths]
        found.append(Setting(proposer, Survival(), "survival", max(lengths)))
    return found


def use(engine: Engine, setting: Setting, speculation: Any) -> None:
    """Draft in this way from now on, with a proposer that knows nothing yet."""
    engine.speculation = None
    if setting.proposer:
        config = replace(engine.resolved.config, speculate=setting.proposer)
        speculation.proposer = build_speculation(config, None).proposer
        speculation.length, speculation.most = setting.control, setting.most
        speculation.costs = setting.costs
        engine.speculation = speculation


def run(engine: Engine, groups: Sequence[Sequence[Turn]]) -> Run:
    """Serve one group of requests after the other."""
    executor: Any = engine.executor
    engine.reset_prefix_cache()
    before, captured, began = engine.stats(), executor.captures, perf_counter()
    for group in groups:
        serve(engine, group)
    seconds, after = perf_counter() - began, engine.stats()
    counts = {name: getattr(after, name) - getattr(before, name) for name in COUNTS}
    return Run(seconds, executor.captures - captured, counts)


def measure(
    engine: Engine, chosen: Sequence[Setting], groups: Sequence[Sequence[Turn]], repeats: int
) -> list[dict[str, Any]]:
    """Every setting with the same requests: rows of the result, the runs in turns."""
    speculation = engine.speculation
    for setting in chosen:  # most of what is compiled, captured and learnt comes at first
        use(engine, setting, speculation)
        run(engine, groups[:1])
    runs: list[list[Run]] = [[] for _ in chosen]
    for _ in range(TRIES):
        for setting, mine in zip(chosen, runs):
            if sum(not one.captures for one in mine) < repeats:
                use(engine, setting, speculation)
                mine.append(run(engine, groups))
    engine.speculation = speculation
    plain = median(one.tokens_per_s for one in counted(runs[0]))
    return [row(setting, mine, plain) for setting, mine in zip(chosen, runs)]


def counted(runs: Sequence[Run]) -> list[Run]:
    """Those without captures; where there is none, the last one."""
    return [one for one in runs if not one.captures] or [runs[-1]]


def row(setting: Setting, runs: Sequence[Run], plain: float) -> dict[str, Any]:
    """What the runs of a setting say."""
    good = counted(runs)
    rates = [one.tokens_per_s for one in good]
    sums = {name: sum(one.counts[name] for one in good) for name in COUNTS}
    tokens, drafted, accepted = (
        sums[f"{kind}_tokens"] for kind in ("output", "drafted", "accepted")
    )
    found = {
        "proposer": setting.proposer, "setting": setting.name, "tokens_per_s": median(rates),
        "ratio": median(rates) / plain, "runs": rates, "tried": len(runs),
        "captures": sum(one.captures for one in good),
        "tokens_per_round": tokens / (tokens - accepted),  # of a sequence
        "tokens_per_step": tokens / sums["steps"],
        "acceptance": accepted / drafted if drafted else None,
    }  # fmt: skip
    print(found, flush=True)
    return found | sums


def groups_of(agents: Sequence[Agent], batch: int, few: int) -> list[list[Turn]]:
    """The requests that are served together: the first `few` agents one after the other, or as many
    as the batch holds turn by turn."""
    if batch == 1:
        return [[turn] for agent in agents[:few] for turn in agent]
    if batch > len(agents):
        raise ConfigError(f"a batch of {batch}, but {len(agents)} agents were recorded")
    return [list(group) for group in zip(*agents[:batch])]


def matching() -> list[dict[str, Any]]:
    """The time that n-grams take to draft, by the length of the prompt; on the host alone."""
    sys.path.insert(0, str(BENCHMARKS))
    import proposers

    rows = list[dict[str, Any]]()
    for kind in proposers.TEXTS:
        for length in LOOKUPS:
            found = proposers.measure("ngram", kind, length)
            rows.append(
                {key: found[key] for key in ("text", "history", "draft_us", "draft_p95_us")}
            )
            print(rows[-1], flush=True)
    return rows


def compare(given: argparse.Namespace) -> None:
    """All settings at all batch sizes, with one engine; the result is written after each."""
    lengths, batches = numbers(given.lengths), numbers(given.batches)
    agents = [agent[: given.turns] for agent in load(Path(given.trace))]
    agents = agents[: max(given.agents, *batches)]
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "max_len": 2048, "max_seqs": max(batches),
        "speculate": PROPOSERS[0], "draft_tokens": max(lengths),
    }  # fmt: skip
    said = {
        "trace": Path(given.trace).name, "turns": given.turns, "agents_alone": given.agents,
        "lengths": lengths, "statistics": statistics(agents),
    }  # fmt: skip
    config = options | {"suffix_trees": suffix_trees()}
    result: dict[str, Any] = {"matching": matching(), "results": []}
    engine, chosen = LLM(**options).engine, settings(PROPOSERS, lengths)
    for batch in batches:
        groups = groups_of(agents, batch, given.agents)
        rows = measure(engine, chosen, groups, given.repeats)
        result["results"] += [{"batch": batch} | one for one in rows]
        record.write(record.header("recorded_drafts", said, config) | result, given.json)
    engine.close()


def numbers(text: str) -> list[int]:
    """Integers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Record, or measure with what was recorded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", default=None, metavar="FILE", help="of a trace, to be written")
    parser.add_argument("--smollm2", default=str(SMOLLM2), help="what is recorded: a GGUF file")
    parser.add_argument("--trace", default=str(TRACE))
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape, or a folder with one")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="fixed ones")
    parser.add_argument("--agents", type=int, default=3, help="that are served alone")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    if given.record:
        record_agents(Path(given.record), given.smollm2, AGENTS)
    else:
        compare(given)


if __name__ == "__main__":
    main()
