"""`Runner`: executes plans on a model. prepare, forward, sample; there is no second path."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.plan import SeqStart, SpanResult, StepPlan, StepResult, TokenLogprobs
from kvarn.kernels.attention import AttentionBackend
from kvarn.kernels.upload import upload
from kvarn.models.decoder import Decoder
from kvarn.models.points import Tap
from kvarn.runner.batch import Batch, build
from kvarn.runner.image import Image
from kvarn.runner.logprobs import logprobs
from kvarn.runner.pool import KVPool
from kvarn.runner.sampler import Sampler

SCORE_ROWS = 128  #: prompt positions whose logits are held at once


class Executor(Protocol):
    """What carries out plans: the real runner here, a priced one in the simulator."""

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step."""
        ...

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Start a step; steps run in the order of their launches."""
        ...


class Runner:
    """One model, its KV pool and its sampler on one device."""

    def __init__(
        self,
        decoder: Decoder,
        groups: list[GroupSpec],
        pool: KVPool,
        backend: AttentionBackend,
        sampler: Sampler,
        page_size: int,
        max_seqs: int,
    ) -> None:
        self.decoder = decoder
        self.spec: ModelSpec = decoder.spec
        self.groups = groups
        self.pool = pool
        self.backend = backend
        self.sampler = sampler
        self.image = Image(max_seqs, len(groups), page_size)
        self.tap: Tap | None = None  #: sees every named point when set (eager research use)
        self._group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self._special: set[int] = set()  # rows that want more than tokens: see _extras
        self._pooled: dict[int, Tensor] = {}  # by row: sum of hidden states of an embedding request
        self._thread: ThreadPoolExecutor | None = None
        _use(decoder.device)()

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Run the step on this runner's own thread, after those launched before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="kvarn-runner", initializer=_use(self.decoder.device)
            )
        return self._thread.submit(self.run, plan)

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step: rows in and out, page copies, forward, sample."""
        began = time.perf_counter()
        self._update(plan)
        result = StepResult(plan.step, [[] for _ in plan.spans])
        if plan.spans:
            batch = build(plan.spans, self.image, self.spec, self.groups)
            hidden = self._forward(batch)
            self._extras(batch, hidden, result)
            self._sample(batch, hidden, result)
        result.seconds = time.perf_counter() - began
        return result

    def _update(self, plan: StepPlan) -> None:
        """Bring the image up to the plan."""
        for seq in plan.stops:
            row = self.image.stop(seq)
            if row is not None:
                self.sampler.stop(row)
                self._special.discard(row)
                self._pooled.pop(row, None)
        for start in plan.starts:
            self._start(start)
        for edit in plan.edits:
            self.image.edit(edit)
        if plan.copies:
            self.pool.copy(plan.copies)

    def _start(self, start: SeqStart) -> None:
        row = self.image.start(start)
        request = start.request
        params = request.sampling
        key = start.seq if params.seed is None else start.index
        self.sampler.start(row, params, request.eos_ids, start.prompt_len, key)
        if request.pooling is not None or params.prompt_logprobs is not None:
            self._special.add(row)

    def _forward(self, batch: Batch) -> Tensor:
        """Final hidden states [T, hidden]."""
        plans = [self.backend.plan(rows) for rows in batch.groups]
        layer_plans = [plans[self._group_of[layer]] for layer in range(self.spec.n_layers)]
        cache = self.pool.cache

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return layer_plans[layer].run(cache[layer], q, k, v)[0]

        device = self.decoder.device
        tokens, positions = upload([batch.tokens, batch.positions], torch.int64, device)
        return self.decoder.forward(tokens, positions, attend, self.tap)

    def _sample(self, batch: Batch, hidden: Tensor, result: StepResult) -> None:
        """Choose the next token of every span that has caught up with what is known."""
        if not len(batch.logits_at):
            return
        wanted = hidden
        if len(batch.logits_at) < len(hidden):
            wanted = hidden[upload([batch.logits_at], torch.int64, hidden.device)[0]]
        logits = self.decoder.logits(wanted, self.tap)
        rows = batch.rows[batch.logits_spans]
        lengths = batch.ends[batch.logits_spans]
        sampled = self.sampler.sample(logits, rows, lengths, self.image.tokens)
        self.image.append(rows, np.array(sampled.tokens, np.int32))
        for at, (span, token) in enumerate(zip(batch.logits_spans.tolist(), sampled.tokens)):
            result.tokens[span] = [token]
            if at in sampled.logprobs:
                extra = result.extras.setdefault(span, SpanResult())
                extra.logprobs = [sampled.logprobs[at]]
            if at in sampled.errors:
                result.extras.setdefault(span, SpanResult()).error = sampled.errors[at]

    def _extras(self, batch: Batch, hidden: Tensor, result: StepResult) -> None:
        """Prompt logprobs and embeddings, for the spans whose requests ask for them."""
        if not self._special:
            return
        for span, row in enumerate(batch.rows.tolist()):
            if row not in self._special:
                continue
            request = self.image.requests[row]
            mine = hidden[batch.indptr[span] : batch.indptr[span + 1]]
            end = int(batch.ends[span])
            extra = result.extras.setdefault(span, SpanResult())
            if request.pooling is not None:
                extra.embedding = self._embed(row, mine, end)
            elif end - len(mine) < self.image.prompt_len[row]:
                extra.prompt_logprobs = self._score(row, mine, end - len(mine))
                extra.scored_from = end - len(mine) + 1

    def _embed(self, row: int, hidden: Tensor, end: int) -> list[float] | None:
        """The pooled hidden state, of length 1, once the prompt is through."""
        if self.image.requests[row].pooling == "mean":
            total = hidden.float().sum(0)
            if row in self._pooled:
                total += self._pooled[row]
            self._pooled[row] = total
        else:
            total = hidden[-1].float()
        if end < self.image.prompt_len[row]:
            return None
        unit: list[float] = torch.nn.functional.normalize(total, dim=0).tolist()
        return unit

    def _score(self, row: int, hidden: Tensor, start: int) -> list[TokenLogprobs]:
        """Logprobs of the prompt's tokens start+1 .. as far as `hidden` reaches."""
        prompt_len = int(self.image.prompt_len[row])
        count = self.image.requests[row].sampling.prompt_logprobs
        assert count is not None
        scores: list[TokenLogprobs] = []
        targets = self.image.tokens[row, start + 1 : min(start + len(hidden) + 1, prompt_len)]
        for at in range(0, len(targets), SCORE_ROWS):
            part = targets[at : at + SCORE_ROWS]
            logits = self.decoder.logits(hidden[at : at + len(part)])
            scores += logprobs(logits, part.tolist(), count)
        return scores


def _use(device: torch.device) -> Callable[[], None]:
    """Makes `device` the calling thread's own, which kernels are launched on."""

    def use() -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    return use
