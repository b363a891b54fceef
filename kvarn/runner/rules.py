"""What a request says about single tokens: masks, bans, biases and penalties on the logits.

A `Rules` holds what is known when a sequence starts. `apply` changes the logits of positions as a
pure function of the rules and of the tokens before each position, in this order: grammar, allowed
ids, bad words, logit bias, min_tokens; then repetition, frequency and presence penalty.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.errors import RequestError
from kvarn.core.request import SamplingParams
from kvarn.runner.grammar import Matcher

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(slots=True)
class Rules:
    """The rules of one sequence."""

    prompt_len: int
    forbidden: Tensor | None = None  #: [V] bool: everything outside `allowed_token_ids`
    matcher: Matcher | None = None
    bad_words: list[NDArray[np.int32]] = field(default_factory=list)
    bias_ids: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    bias: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    min_len: int = 0  #: no token of `ends` before the sequence has this length [tokens]
    ends: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    error: str | None = None  #: the sequence cannot be sampled at all

    def names(self) -> str:
        """The request's fields that can forbid tokens, for an error message."""
        named = {
            "grammar": self.matcher is not None,
            "allowed_token_ids": self.forbidden is not None,
            "bad_words": bool(self.bad_words),
            "min_tokens": self.min_len > 0,
        }
        return ", ".join(name for name, there in named.items() if there)


@dataclass(slots=True)
class Position:
    """One row of logits and what stands before it."""

    row: int  #: of the logits
    rules: Rules
    history: NDArray[np.int32]  #: prompt and output so far

    @property
    def output(self) -> NDArray[np.int32]:
        """What was generated so far."""
        return self.history[self.rules.prompt_len :]


def needs_rules(params: SamplingParams) -> bool:
    """False for most requests: nothing but temperature, top-k, top-p and min-p."""
    return bool(
        params.grammar is not None
        or params.allowed_token_ids is not None
        or params.bad_word_ids
        or params.logit_bias
        or params.min_tokens
        or params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
    )


def make_rules(
    params: SamplingParams,
    eos_ids: tuple[int, ...],
    prompt_len: int,
    vocab: int,
    device: torch.device,
    matcher: Matcher | None,
) -> Rules:
    """Everything that does not depend on the position, laid out once."""
    rules = Rules(prompt_len, matcher=matcher)
    if params.allowed_token_ids is not None:
        rules.forbidden = torch.ones(vocab, dtype=torch.bool, device=device)
        rules.forbidden[list(params.allowed_token_ids)] = False
    rules.bad_words = [np.array(ids, np.int32) for ids in params.bad_word_ids]
    rules.bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
    rules.bias = np.fromiter(params.logit_bias.values(), np.float32)
    if params.min_tokens:
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        rules.min_len = prompt_len + params.min_tokens
        rules.ends = np.array(sorted(ends), np.int64)
    rules.repetition = params.repetition_penalty
    rules.frequency = params.frequency_penalty
    rules.presence = params.presence_penalty
    return rules


def apply(logits: Tensor, positions: list[Position]) -> dict[int, str]:
    """Change the logits [R, V] of `positions` in place; errors by row of the logits."""
    errors: dict[int, str] = {}
    for at in positions:
        message = _mask(logits[at.row], at)
        if message is not None:
            errors[at.row] = message
    pairs = _Pairs()
    for at in positions:
        pairs.add(at.row, banned(at), -np.inf)
        pairs.add(at.row, at.rules.bias_ids, at.rules.bias)
    pairs.add_to(logits)
    _penalise(logits, positions)
    return errors


def _mask(logits: Tensor, at: Position) -> str | None:
    rules = at.rules
    if rules.error is not None:
        return rules.error
    if rules.matcher is not None:
        try:
            allowed = rules.matcher.allowed(at.output)
        except RequestError as error:
            return error.message
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
    if rules.forbidden is not None:
        logits.masked_fill_(rules.forbidden, -torch.inf)
    return None


def banned(at: Position) -> Ints:
    """Tokens that bad words and min_tokens forbid at a position.

    A bad word of several tokens forbids its last one where the others stand right before it, be it
    in the prompt or in the output.
    """
    history, found = at.history, []
    for word in at.rules.bad_words:
        n = len(word) - 1
        if n <= len(history) and np.array_equal(history[len(history) - n :], word[:n]):
            found.append(int(word[-1]))
    ids = np.array(found, np.int64)
    return np.concatenate([ids, at.rules.ends]) if len(history) < at.rules.min_len else ids


def _penalise(logits: Tensor, positions: list[Position]) -> None:
    """Repetition over prompt and output; frequency and presence over the output alone."""
    seen, minus = _Pairs(), _Pairs()
    for at in positions:
        rules = at.rules
        if rules.repetition != 1.0:
            seen.add(at.row, np.unique(at.history), rules.repetition)
        if rules.frequency or rules.presence:
            ids, counts = np.unique(at.output, return_counts=True)
            minus.add(at.row, ids, -(rules.frequency * counts + rules.presence))
    seen.divide(logits)
    minus.add_to(logits)


class _Pairs:
    """(row, token, number) triples from several rows, for one operation on all of them."""

    def __init__(self) -> None:
        self._rows: list[Ints] = []
        self._ids: list[Ints] = []
        self._numbers: list[Floats] = []

    def add(self, row: int, ids: NDArray[Any], numbers: NDArray[Any] | float) -> None:
        if ids.size:
            self._rows.append(np.full(ids.size, row, np.int64))
            self._ids.append(ids.astype(np.int64))
            self._numbers.append(np.broadcast_to(np.asarray(numbers, np.float32), ids.shape))

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        lists = (self._rows, self._ids, self._numbers)
        rows, ids, numbers = (torch.from_numpy(np.concatenate(x)).to(device) for x in lists)
        return rows, ids, numbers

    def add_to(self, logits: Tensor) -> None:
        """logits += number; a pair may occur more than once."""
        if self._rows:
            rows, ids, numbers = self._tensors(logits.device)
            logits.index_put_((rows, ids), numbers, accumulate=True)

    def divide(self, logits: Tensor) -> None:
        """Towards less likely by a factor: logits / number where positive, * number elsewhere."""
        if self._rows:
            rows, ids, numbers = self._tensors(logits.device)
            old = logits[rows, ids]
            logits[rows, ids] = torch.where(old > 0, old / numbers, old * numbers)
