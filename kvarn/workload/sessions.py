"""Synthetic sessions: conversations with people, and agents with their tools.

A turn's prompt is all that went before it, the answers included, and something new. The number of
turns is geometric; between an answer and the next turn lies a log-normal time. A trace needs an
arrival for every turn: it is the parent's, plus `s_per_token` for each token of its answer, plus
the think time. A closed loop ignores that guess and uses `parent` and `think`.
"""

import math
from dataclasses import dataclass
from random import Random

from kvarn.core.errors import ConfigError
from kvarn.workload import arrivals
from kvarn.workload.chains import Chains, Piece, length
from kvarn.workload.lengths import LogNormal, Zipf, lognormal
from kvarn.workload.trace import Trace, TraceRequest


@dataclass(slots=True, frozen=True)
class Conduct:
    """How sessions go."""

    turns: float  #: mean number
    new: LogNormal  #: what a turn adds to the history, before its answer [tokens]
    answer: LogNormal  #: [tokens]
    think: LogNormal  #: from an answer to the next turn [s]
    prompts: Zipf  #: which system prompt a session starts with
    prefix: int  #: its length [tokens]
    s_per_token: float  #: guessed time of a token of an answer [s]
    max_len: int  #: a session ends before prompt and answer exceed it [tokens]
    kind: str


def multi_turn(
    sessions: int = 200, rate: float = 0.2, cv: float = 1.0, turns: float = 4.0,
    n_in: float = 200, in_cv: float = 1.0, n_out: float = 300, out_cv: float = 1.0,
    think: float = 30.0, think_cv: float = 1.0, prompts: int = 8, exponent: float = 1.0,
    prefix: int = 512, s_per_token: float = 0.03, max_len: int = 32_768, block_size: int = 16,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Conversations: `rate` sessions per second, each turn adds what the user and model said."""
    conduct = Conduct(
        turns, lognormal(n_in, in_cv), lognormal(n_out, out_cv), lognormal(think, think_cv),
        Zipf(prompts, exponent), prefix, s_per_token, max_len, "chat",
    )  # fmt: skip
    requests = _sessions(conduct, sessions, rate, cv, block_size, Random(f"multi-turn {seed}"))
    return Trace("synthetic-multi-turn", requests, block_size)


def agents(
    sessions: int = 50, rate: float = 0.05, cv: float = 1.0, steps: float = 15.0,
    tool_out: float = 800, tool_cv: float = 1.5, n_out: float = 150, out_cv: float = 1.0,
    tool_time: float = 3.0, tool_time_cv: float = 1.5, prompts: int = 4, exponent: float = 1.0,
    prefix: int = 4096, s_per_token: float = 0.03, max_len: int = 131_072, block_size: int = 16,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Agents: each step calls a tool, whose output comes back after `tool_time` and is appended."""
    conduct = Conduct(
        steps, lognormal(tool_out, tool_cv), lognormal(n_out, out_cv),
        lognormal(tool_time, tool_time_cv), Zipf(prompts, exponent), prefix, s_per_token, max_len,
        "agent",
    )  # fmt: skip
    requests = _sessions(conduct, sessions, rate, cv, block_size, Random(f"agents {seed}"))
    return Trace("synthetic-agents", requests, block_size)


def _sessions(
    conduct: Conduct, n: int, rate: float, cv: float, block_size: int, rng: Random
) -> tuple[TraceRequest, ...]:
    _check(conduct, n)
    chains = Chains(block_size)
    requests: list[TraceRequest] = []
    for i, start in zip(range(n), arrivals.gamma(rng, rate, cv)):
        requests += _session(conduct, f"s{i}", start, chains, rng)
    return tuple(sorted(requests, key=lambda one: one.at))


def _check(conduct: Conduct, n: int) -> None:
    if n < 1 or not 1 <= conduct.turns < math.inf:
        raise ConfigError(f"sessions and turns must be at least 1, got {n} and {conduct.turns}")
    if conduct.prefix < 0 or not 0 <= conduct.s_per_token < math.inf:
        raise ConfigError(
            f"prefix and s_per_token must be at least 0, got {conduct.prefix} and "
            f"{conduct.s_per_token}"
        )
    if conduct.max_len < conduct.prefix + 2:
        raise ConfigError(
            f"max_len is {conduct.max_len}, no room for a turn after {conduct.prefix} tokens of "
            f"system prompt"
        )


def _session(
    conduct: Conduct, name: str, at: float, chains: Chains, rng: Random
) -> list[TraceRequest]:
    """The turns of one session; its first is cut to what fits, so that there always is one."""
    history: list[Piece] = [(("system", conduct.prompts.sample(rng)), conduct.prefix)]
    turns: list[TraceRequest] = []
    think = 0.0
    while True:
        new, n_out = conduct.new.sample(rng), conduct.answer.sample(rng)
        room = conduct.max_len - length(history)
        if not turns:
            new = min(new, room - 1)
            n_out = min(n_out, room - new)
        if new + n_out > room:
            return turns
        turn = len(turns)
        history.append(((name, "new", turn), new))
        parent = turns[-1].id if turns else None
        turns.append(
            TraceRequest(
                f"{name}.{turn}", at, length(history), n_out, chains.blocks(history), name, turn,
                parent, think, conduct.kind,
            )
        )  # fmt: skip
        history.append(((name, "answer", turn), n_out))
        if rng.random() * conduct.turns < 1:
            return turns
        think = conduct.think.draw(rng)
        at += n_out * conduct.s_per_token + think
