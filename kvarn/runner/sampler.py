"""From logits to tokens, for many sequences and positions at once.

Every position is a pure function of its logits, the request's parameters, and the tokens before it,
so that several positions of one sequence can be sampled in one step (speculation), in any batch and
after any preemption, with the same result. In order: raw logprobs; rules (`kvarn.runner.rules`);
temperature; min-p; top-k; top-p; choice; processed logprobs.

Greedy rows (temperature 0) take the lowest id among the largest logits. The others take one uniform
number from (key of the sequence, position) and invert the cumulated distribution in the order of
token ids. On a GPU one kernel (`kvarn.kernels.triton.sample`) chooses for all rows in this order,
with sums in fp32: nothing has to come back to the host before the next step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.errors import RequestError
from kvarn.core.plan import TokenLogprobs
from kvarn.core.request import SamplingParams
from kvarn.kernels.upload import upload
from kvarn.runner.choose import argmax, draw, lowest_kept
from kvarn.runner.grammar import GrammarCompiler
from kvarn.runner.logprobs import logprobs
from kvarn.runner.rules import Position, Rules, apply, make_rules, needs_rules
from kvarn.runner.uniform import sequence_key, uniform
from kvarn.runner.verify import Drafted, Drawn, accept

Ints = NDArray[np.int64]

#: below this, a division by the temperature would leave the range of fp32
COLDEST = 1e-30

NO_GRAMMARS = (
    "structured output needs a tokenizer and an end-of-sequence token; this model lacks one"
)

NO_DRAFTS = Drafted()

#: what is known of a device row, as one numpy record
ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("key", np.uint64),
        ("logprobs", np.int64),  # -1: not asked for
        ("raw", np.bool_),  # logprobs of the model's own logits
        ("ruled", np.bool_),  # has an entry in `Sampler._rules`
    ]
)


@dataclass(slots=True)
class Sampled:
    """One token for each row of logits. Where there is an error, the token means nothing."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  #: by row of the logits
    errors: dict[int, str] = field(default_factory=dict)  #: by row of the logits


class Sampler:
    """The sampling state of the device rows."""

    def __init__(
        self, vocab: int, device: torch.device, seed: int, grammars: GrammarCompiler | None
    ) -> None:
        """`vocab` is the width of the logits, `seed` the engine's, for requests without one.

        `grammars` is None where there is no tokenizer, or no end-of-sequence token.
        """
        self._vocab = vocab
        self._device = device
        self._seed = seed
        self._grammars = grammars
        self._rows = np.zeros(0, ROW)
        self._rules: dict[int, Rules] = {}

    def start(
        self,
        row: int,
        params: SamplingParams,
        eos_ids: tuple[int, ...],
        prompt_len: int,
        key: int,
    ) -> None:
        """A sequence enters device row `row`.

        `key` numbers the sequence: its index among the request's n when the request has a seed,
        else any number that no other sequence of this engine has.
        """
        if row >= len(self._rows):
            more = np.zeros(max(row + 1, 2 * len(self._rows)) - len(self._rows), ROW)
            self._rows = np.concatenate([self._rows, more])
        seed = self._seed if params.seed is None else params.seed
        self._rules.pop(row, None)
        if needs_rules(params):
            self._rules[row] = self._make_rules(params, eos_ids, prompt_len)
        self._rows[row] = (
            params.temperature,
            min(max(params.top_k, 0), self._vocab),
            params.top_p,
            params.min_p,
            sequence_key(seed, key),
            -1 if params.logprobs is None else params.logprobs,
            params.logprobs_mode == "raw",
            row in self._rules,
        )

    def stop(self, row: int) -> None:
        """The sequence in `row` leaves."""
        self._rules.pop(row, None)
        self._rows[row] = np.zeros((), ROW)

    def _make_rules(
        self, params: SamplingParams, eos_ids: tuple[int, ...], prompt_len: int
    ) -> Rules:
        matcher = None
        if params.grammar is not None:
            if self._grammars is None:
                return Rules(prompt_len, error=NO_GRAMMARS)
            try:
                matcher = self._grammars.matcher(params.grammar, params.ignore_eos)
            except RequestError as error:
                return Rules(prompt_len, error=error.message)
        return make_rules(params, eos_ids, prompt_len, self._vocab, self._device, matcher)

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        tokens: NDArray[np.int32],
        drafted: Drafted | None = None,
    ) -> Sampled:
        """Choose a token for each row of `logits` [R, V] (fp32; may be changed in place).

        Row r continues `tokens[rows[r], :lengths[r]]`; one device row may occur several times with
        different lengths. Errors are of that row alone. `drafted`: rows whose choice falls among
        drafts of known distribution, and rows of trees, which continue other tokens.
        """
        drafted = drafted or NO_DRAFTS
        state = self._rows[rows]
        result = Sampled([])
        choose = self._choose_on_gpu if logits.is_cuda else self._choose
        raw = np.flatnonzero((state["logprobs"] >= 0) & state["raw"])
        untouched = logits[self._index(raw)] if raw.size else logits
        self._apply_rules(logits, rows, lengths, tokens, state, result, drafted.paths)
        chosen = choose(logits, rows, lengths, state, result, drafted.drawn)
        result.tokens = chosen.tolist()
        if raw.size:
            _report(untouched, raw, chosen, state, result)
        return result

    def plain(self, rows: Ints) -> bool:
        """Whether these rows want nothing but a token: no rules, no logprobs."""
        state = self._rows[rows]
        return not state["ruled"].any() and not (state["logprobs"] >= 0).any()

    def ruled(self, rows: Ints) -> bool:
        """Whether the tokens before decide about the next one of any of these rows."""
        return bool(self._rules) and bool(self._rows[rows]["ruled"].any())

    def filtered(self, rows: Ints) -> bool:
        """Whether top-k, top-p or min-p leaves something out in any of these rows."""
        state = self._rows[rows]
        return bool(((state["top_k"] > 0) | (state["top_p"] < 1) | (state["min_p"] > 0)).any())

    def parameters(self, rows: Ints, lengths: Ints) -> dict[str, NDArray[np.int32]]:
        """What the GPU's kernel takes, by name, as the bits of int32 arrays."""
        state = self._rows[rows]
        return {
            "temperature": np.ascontiguousarray(state["temperature"]).view(np.int32),
            "top_k": state["top_k"].astype(np.int32),
            "top_p": state["top_p"].astype(np.float32).view(np.int32),
            "min_p": np.ascontiguousarray(state["min_p"]).view(np.int32),
            "key": np.ascontiguousarray(state["key"]).view(np.int32),
            "length": lengths.astype(np.int32),
        }

    def _choose_on_gpu(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        state: NDArray[np.void],
        result: Sampled,
        drawn: Drawn | None,
    ) -> Ints:
        arrays = self.parameters(rows, lengths)
        parameters = dict(zip(arrays, upload(list(arrays.values()), torch.int32, logits.device)))
        chosen = sample_on_gpu(logits, parameters, self.filtered(rows)).cpu().numpy()
        lost = np.flatnonzero(chosen < 0)
        if lost.size:
            best = logits[self._index(lost)].amax(-1)
            self._find_faults(best, lost, rows, lengths, result)
        if drawn is not None:
            some = drawn.of(np.flatnonzero(state["temperature"][drawn.rows] > 0))
            weights = logits[self._index(some.rows)]
            self._weigh(weights, state[some.rows])
            self._accept(weights, some, state, lengths, chosen)
        asked = np.flatnonzero((state["logprobs"] >= 0) & ~state["raw"])
        for warm in (False, True):
            some = asked[(state["temperature"][asked] > 0) == warm]
            if some.size:
                scores = logits[self._index(some)]
                if warm:
                    self._weigh(scores, state[some])
                    scores.log_()
                _report(scores, some, chosen, state, result)
        return chosen.astype(np.int64)

    def _choose(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        state: NDArray[np.void],
        result: Sampled,
        drawn: Drawn | None,
    ) -> Ints:
        chosen = np.zeros(len(rows), np.int64)
        warm = state["temperature"] > 0
        for group in (np.flatnonzero(~warm), np.flatnonzero(warm)):
            if not group.size:
                continue
            part = logits if len(group) == len(rows) else logits[self._index(group)]
            if warm[group[0]]:
                u = uniform(state["key"][group], lengths[group])
                picked, best = self._draw(part, state[group], u)
            else:
                picked, best = argmax(part)
            chosen[group] = picked.cpu().numpy()
            self._find_faults(best, group, rows, lengths, result)
            if drawn is not None and warm[group[0]]:
                some = drawn.of(np.flatnonzero(warm[drawn.rows]))
                weights = part[self._index(np.searchsorted(group, some.rows))]
                self._accept(weights, some, state, lengths, chosen)
            asked = np.flatnonzero((state["logprobs"][group] >= 0) & ~state["raw"][group])
            if asked.size:
                scores = part[self._index(asked)]
                scores = scores.log_() if warm[group[0]] else scores
                _report(scores, group[asked], chosen, state, result)
        return chosen

    def _accept(
        self, weights: Tensor, drawn: Drawn, state: NDArray[np.void], lengths: Ints, chosen: Ints
    ) -> None:
        """Choose at the rows of `drawn` by acceptance; `weights` [N, V] as `_weigh` leaves them."""
        at = drawn.rows
        if at.size:
            chosen[at] = accept(weights, drawn, state["key"][at], lengths[at]).cpu().numpy()

    def _index(self, numbers: Ints) -> Tensor:
        return upload([numbers], torch.int64, self._device)[0]

    def _apply_rules(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        tokens: NDArray[np.int32],
        state: NDArray[np.void],
        result: Sampled,
        paths: Mapping[int, tuple[int, list[int]]],
    ) -> None:
        positions = []
        for r in np.flatnonzero(state["ruled"]).tolist():
            history = tokens[rows[r], : lengths[r]]
            if r in paths:
                start, path = paths[r]
                history = history.copy()
                history[start:] = path
            positions.append(Position(r, self._rules[int(rows[r])], history))
        if positions:
            result.errors.update(apply(logits, positions))

    def _draw(
        self, logits: Tensor, state: NDArray[np.void], u: NDArray[np.float64]
    ) -> tuple[Tensor, Tensor]:
        """Draw by temperature, min-p, top-k and top-p; also the largest logit of each row."""
        best = self._weigh(logits, state)
        return draw(logits, upload([u], torch.float64, self._device)[0]), best

    def _weigh(self, logits: Tensor, state: NDArray[np.void]) -> Tensor:
        """Logits to kept weights in place: exp((logit - largest) / temperature), 0 where left out.

        Returns the largest logit of each row.
        """
        best = logits.amax(-1)
        fine = torch.isfinite(best)
        if not bool(fine.all()):
            logits[~fine] = 0.0  # these rows are errors; any distribution will do
        weights = logits.sub_(torch.where(fine, best, 0.0)[:, None])
        if (state["temperature"] != 1).any():
            weights.div_(self._column(np.maximum(state["temperature"], COLDEST)))
        weights.exp_()
        if (state["min_p"] > 0).any():
            weights.masked_fill_(weights < self._column(state["min_p"]), 0.0)
        filtered = np.flatnonzero((state["top_k"] > 0) | (state["top_p"] < 1))
        if filtered.size:
            some = weights if len(filtered) == len(state) else weights[self._index(filtered)]
            top_k = self._index(state["top_k"][filtered])
            top_p = upload([state["top_p"][filtered]], torch.float64, self._device)[0]
            lowest = torch.zeros_like(best)
            lowest[self._index(filtered)] = lowest_kept(some, top_k, top_p)
            weights.masked_fill_(weights < lowest[:, None], 0.0)
        return best

    def _column(self, numbers: NDArray[np.float32]) -> Tensor:
        return upload([numbers], torch.float32, self._device)[0][:, None]

    def _find_faults(
        self, best: Tensor, group: Ints, rows: Ints, lengths: Ints, result: Sampled
    ) -> None:
        """A row whose largest logit is not a number has no token."""
        values = best.cpu().numpy()
        for i in np.flatnonzero(~np.isfinite(values)):
            r = int(group[i])
            rules = self._rules.get(int(rows[r]))
            if values[i] == -np.inf and rules is not None:
                message = (
                    f"no token is allowed at position {lengths[r]} by {rules.names()}; "
                    f"loosen one of them"
                )
            else:
                message = f"the model's logits at position {lengths[r]} are not finite"
            result.errors.setdefault(r, message)


def sample_on_gpu(logits: Tensor, parameters: Mapping[str, Tensor], filtered: bool) -> Tensor:
    """Tokens [R] int32 of logits [R, V], -1 where none can be chosen; nothing waits.

    `parameters` are those of `Sampler.parameters`; `filtered`: whether any row filters.
    """
    from kvarn.kernels.triton.sample import sample

    bits = parameters
    tokens: Tensor = sample(
        logits,
        bits["temperature"].view(torch.float32),
        bits["top_k"],
        bits["top_p"].view(torch.float32),
        bits["min_p"].view(torch.float32),
        bits["key"].view(torch.int64),
        bits["length"],
        filtered=filtered,
    )
    return tokens


def _report(
    scores: Tensor, at: Ints, chosen: Ints, state: NDArray[np.void], result: Sampled
) -> None:
    """Logprobs of the chosen tokens; row i of `scores` belongs to row at[i] of the logits."""
    most = int(state["logprobs"][at].max())
    for r, found in zip(at.tolist(), logprobs(scores, chosen[at].tolist(), most)):
        found.top = found.top[: int(state["logprobs"][r])]
        result.logprobs[r] = found
