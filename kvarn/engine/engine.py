"""`Engine`: plan, execute, apply. Two loops, each readable at a glance; the rest is hand-over.

Drafts are verified in either: the plan that has them is made when what they follow is known. What
they are need not be: a device makes them, and begins the next ones, without a word from the host.

Errors belong to the request: a step that breaks ends the sequences in it, and nothing else.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import OutOfMemoryError
from torch.cuda import empty_cache

from kvarn.core.bad_words import encode_bad_words
from kvarn.core.config import Resolved
from kvarn.core.errors import EngineDied, RequestError
from kvarn.core.output import EngineStats, Output, Timings
from kvarn.core.plan import SpanResult, StepPlan, StepResult, TokenLogprobs
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.core.validate import validate
from kvarn.engine.assemble import Assembly, assemble
from kvarn.engine.ranks import on_ranks
from kvarn.engine.text import TextTap
from kvarn.runner.executor import Pending, Runner
from kvarn.schedule.control import Progress
from kvarn.speculate.speculation import Speculation

log = logging.getLogger("kvarn.engine")


class Engine:
    """One model being served: `add` requests, call `step` while `has_work`, `abort` at any time."""

    def __init__(self, resolved: Resolved, clock: Callable[[], float] = time.monotonic) -> None:
        """Load the model and lay out memory (seconds). Nothing is global: make as many as fit."""
        parts: Assembly = assemble(resolved) if resolved.config.tp == 1 else on_ranks(resolved)
        self.resolved = resolved
        self.assembly = parts
        self.spec = parts.model.spec
        self.tokenizer = parts.model.tokenizer
        self.control = parts.control
        self.executor = parts.runner
        self.clock = clock
        self.overlap = resolved.config.overlap == "on"
        self.speculation = parts.speculation
        self._recorded = clock()  # when the last step was
        self._in_flight: tuple[StepPlan, Pending] | None = None
        self._taps: dict[int, TextTap] = {}  # by sequence
        self._scores: dict[int, list[TokenLogprobs | None]] = {}  # prompt logprobs so far

    # requests

    def add(self, request: Request) -> None:
        """Queue a request; `RequestError` says what is wrong, `QueueFull` when to come back."""
        validate(request, self.assembly.limits)
        self.assembly.rules.check(request)
        if self.control.knows(request.id):
            raise RequestError(f"request id {request.id!r} is already open", param="request_id")
        params = request.sampling
        grammars = self.assembly.grammars
        if params.grammar is not None and grammars is not None:
            problem = grammars.check(params.grammar)
            if problem is not None:
                raise RequestError(problem, param="grammar", code="invalid_grammar")
        tokenizer = self.tokenizer
        if params.bad_words and tokenizer is not None:
            ids = encode_bad_words(params.bad_words, lambda text: tokenizer.encode(text, False))
            params = replace(params, bad_word_ids=params.bad_word_ids + ids)
        eos_ids = request.eos_ids or self.spec.eos_ids
        request = replace(request, sampling=params, eos_ids=eos_ids)
        if not self.has_work:
            self._recorded = self.clock()
        for seq in self.control.add(request):
            if tokenizer is not None:
                stream = tokenizer.stream(params.skip_special_tokens)
                self._taps[seq.id] = TextTap(
                    stream, params.stop, params.include_stop, params.min_tokens
                )
            if params.prompt_logprobs is not None:
                self._scores[seq.id] = [None]

    def abort(self, request_id: str) -> None:
        """Drop a request; it gets no further output. Unknown ids are ignored: it may have ended."""
        for seq in self.control.abort(request_id, self.clock()):
            self._forget(seq)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.control.has_work or self._in_flight is not None

    # the two loops

    def step(self) -> list[Output]:
        """Advance every scheduled sequence once; what is new for whom."""
        if not self.has_work:
            return []
        progress = [] if self.speculation is None else self._draft(self.speculation)
        if self.has_work:
            progress += self._step_overlapped() if self.overlap else self._step()
        now = self.clock()
        outputs = [self._output(p, now) for p in progress]
        if not self.has_work:
            self._check_books()
            if self.speculation is not None:  # what learns beside the steps has time now
                self.speculation.between_steps(self.control)
        return outputs

    def _step(self) -> list[Progress]:
        """Decide, compute, record."""
        plan = self.control.plan(self.clock())
        try:
            result = self.executor.run(plan)
        except Exception as error:
            return self._broken([plan], error)
        return self._record(plan, result)

    def _step_overlapped(self) -> list[Progress]:
        """Decide step n+1 and hand it over while step n computes; then record step n."""
        plan = self.control.plan(self.clock())
        ahead, refusal = None, None
        try:
            ahead = (plan, self.executor.launch(plan)) if plan.has_work else None
        except Exception as error:
            refusal = error
        if ahead is not None and plan.drafts and self.speculation is not None:
            self.speculation.begin(ahead[1])
        done, self._in_flight = self._in_flight, ahead
        progress = [] if done is None else self._collect(*done)
        return progress if refusal is None else progress + self._broken([plan], refusal)

    def _draft(self, speculation: Speculation) -> list[Progress]:
        """Have the next plan verify drafts, if any are wanted.

        They follow what is known, and what follows drafts must know which stand: a step is recorded
        before such a plan is made. What its outputs take is hidden behind the one that comes next.
        """
        progress = self._land() if self._in_flight and self._in_flight[0].drafts else []
        speculation.between_steps(self.control)
        lengths = speculation.lengths(self.control)
        if lengths:
            progress += self._land()
            drafts = speculation.propose(self.control, lengths)
            if drafts:
                self.control.draft(drafts)
        return progress

    def _land(self) -> list[Progress]:
        """Record the step that is in flight, if one is."""
        done, self._in_flight = self._in_flight, None
        return [] if done is None else self._collect(*done)

    def _collect(self, plan: StepPlan, pending: Pending) -> list[Progress]:
        """Record a step that was handed over; the one behind it falls with it."""
        try:
            result = pending.result()
        except Exception as error:
            ahead, self._in_flight = self._in_flight, None
            if ahead is None:
                return self._broken([plan], error)
            _wait(ahead[1])  # let it end before its pages are given to others
            return self._broken([plan, ahead[0]], error)
        return self._record(plan, result)

    def _record(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        now = self.clock()
        progress = self.control.apply(plan, result, now)
        if self.speculation is not None and plan.spans:
            self.speculation.observe(plan, result, now - self._recorded)
        self._recorded = now
        if not plan.spans and not self._in_flight:
            progress += self._unstick(now)
        return progress

    def _unstick(self, now: float) -> list[Progress]:
        """Nothing runs and the first in the queue was not let in: it never will be. Say so."""
        queues = self.control.queues
        if queues.running or not queues.waiting:
            return []
        seq = queues.waiting[0]
        self.control.finish(seq, "error", now)
        need, pages = len(seq.tokens), self.control.kv.pages
        message = f"no room for {need} tokens in a KV cache of {pages} pages by group"
        return [Progress(seq, [], "error", None, SpanResult(error=message))]

    def _broken(self, plans: list[StepPlan], error: Exception) -> list[Progress]:
        """The steps raised: their sequences end with the error, everything else goes on.

        Where the device was out of memory they are computed again in smaller steps instead; where
        a rank is lost, everything ends.
        """
        if isinstance(error, EngineDied):
            raise error
        now = self.clock()
        if isinstance(error, OutOfMemoryError):
            ended = self.control.retreat(plans, now)
            empty_cache()
            log.warning(
                "out of memory in step %d: from now on %d positions and %d sequences a step",
                plans[0].step, self.control.budget, self.control.max_seqs,
            )  # fmt: skip
        else:
            log.exception("step %d failed", plans[0].step, exc_info=error)
            ended = self.control.fail(plans, now)
        message = f"the engine failed while computing this request: {error}"
        return [Progress(seq, [], "error", None, SpanResult(error=message)) for seq in ended]

    # hand-over

    def _output(self, progress: Progress, now: float) -> Output:
        """Tokens to text, stop strings, logprobs, timings."""
        seq, finish = progress.seq, progress.finish
        stop: int | str | None = progress.stop
        text, tap, tokens = "", self._taps.get(seq.id), progress.tokens
        if tap is not None:
            shown = tokens
            if finish == "stop" and not seq.request.sampling.include_stop:
                shown = shown[:-1]  # the stop token itself is no text
            text = tap.push(shown)
            if finish is not None:
                text += tap.finish()
            early = tap.taken < len(shown)  # before what else was accepted with it
            if tap.matched is not None and (early or finish in (None, "length")):
                if finish is None:
                    self.control.finish(seq, "stop", now)
                finish, stop = "stop", tap.matched
                tokens = tokens[: tap.taken]
        extra = progress.extra
        request = seq.request
        output = Output(
            request_id=request.id,
            index=seq.index,
            tokens=tokens,
            text=text,
            finish=finish,
            stop=stop,
            n_prompt=len(request.prompt),
            n_output=seq.n_output - len(progress.tokens) + len(tokens),
            n_cached=seq.cached,
            timings=_timings(seq, now),
        )
        if extra is not None:
            output.logprobs = extra.logprobs and extra.logprobs[: len(tokens)]
            output.embedding = extra.embedding
            output.error = extra.error
            self._score(seq, extra)
        if len(self._scores.get(seq.id, ())) >= seq.prompt_len:
            output.prompt_logprobs = self._scores.pop(seq.id)
        if finish is not None:
            self._forget(seq)
        return output

    def _score(self, seq: Seq, extra: SpanResult) -> None:
        """Keep new prompt logprobs; a resumed sequence brings some a second time."""
        known = self._scores.get(seq.id)
        if extra.prompt_logprobs is not None and known is not None:
            known += extra.prompt_logprobs[max(0, len(known) - extra.scored_from) :]

    def _forget(self, seq: Seq) -> None:
        self._taps.pop(seq.id, None)
        self._scores.pop(seq.id, None)
        if self.speculation is not None:
            self.speculation.forget(seq)

    def _check_books(self) -> None:
        """Idle: no page may be held. A difference is logged and repaired, never fatal."""
        kv = self.control.kv
        if any(kv.held(group) for group in range(len(kv.groups))):
            for problem in self.control.check_integrity():
                log.error("page books differ, repaired: %s", problem)

    # what is there

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        found = self.control.stats()
        if isinstance(self.executor, Runner):
            found.replayed_verify_steps = self.executor.replayed["verify"]
        if self.speculation is not None and self.speculation.trainer is not None:
            found.trainer = self.speculation.trainer.stats()
        return found

    def reset_prefix_cache(self) -> bool:
        """Drop every cached prefix that nobody uses; True when none is left in use."""
        self.control.clear_prefixes(self.clock())
        return not self.control.queues.running

    def explain(self) -> dict[str, Any]:
        """Options in force and why, parts, capabilities, memory, start-up times."""
        return self.assembly.explain(self.resolved)

    def close(self) -> None:
        """Stop the executor's thread, let go of the memory, end the step log."""
        if self._in_flight is not None:
            _wait(self._in_flight[1])
            self._in_flight = None
        if self.speculation is not None:
            self.speculation.close()
        self.executor.close()
        if self.assembly.step_log is not None:
            self.assembly.step_log.close()


def _wait(pending: Pending) -> None:
    """Until the step has ended, however."""
    try:
        pending.result()
    except Exception:
        log.debug("a step whose result nobody wants failed", exc_info=True)


def _timings(seq: Seq, now: float) -> Timings:
    arrival = seq.request.arrival
    return Timings(
        queue=(seq.admitted_at if seq.admitted_at is not None else now) - arrival,
        first_token=(seq.first_token_at if seq.first_token_at is not None else now) - arrival,
        total=now - arrival,
    )
