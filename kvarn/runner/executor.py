"""`Runner`: executes plans on a model. prepare, forward, sample; there is no second path."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.plan import SeqStart, StepPlan, StepResult
from kvarn.kernels.attention import AttentionBackend, Ints, PagedRows
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.attention.tree import Forest, TreePlan
from kvarn.kernels.upload import upload
from kvarn.models.decoder import Decoder, Stage
from kvarn.models.points import Tap
from kvarn.runner.batch import Batch, build
from kvarn.runner.extras import Extras
from kvarn.runner.filtering import Filtering
from kvarn.runner.graphs import Graphs
from kvarn.runner.heads import Layers
from kvarn.runner.image import Image
from kvarn.runner.inflight import InFlight, Seen
from kvarn.runner.keeping import Keeping, Watched, WatchingPlan
from kvarn.runner.late import remember, wait_where_seen
from kvarn.runner.logprobs import most_likely
from kvarn.runner.pieces import Pieces
from kvarn.runner.pool import KVPool
from kvarn.runner.sampler import Sampler, sample_on_gpu
from kvarn.runner.selecting import Choice, Selecting, SelectingStep
from kvarn.runner.state import DeviceState
from kvarn.runner.trees import is_tree, path, straightened
from kvarn.runner.turning import Turning
from kvarn.runner.verify import Drafted, drawn
from kvarn.sparse.rules import Rules


class Pending(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for it; raises what the step raised."""
        ...


class Executor(Protocol):
    """What carries out plans: the real runner here, a priced one in the simulator."""

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step."""
        ...

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; steps run in the order of their launches."""
        ...

    def close(self) -> None:
        """Let go of threads and processes."""
        ...


class Runner:
    """One model, its KV pool and its sampler on one device.

    With `state` (a GPU) a step is only handed over: it takes tokens that are not sampled yet from
    the device, and its own are looked at when somebody asks for the result. At most one step is
    ahead of the one that is being waited for.
    """

    def __init__(
        self,
        decoder: Decoder,
        groups: list[GroupSpec],
        pool: KVPool,
        backend: AttentionBackend,
        sampler: Sampler,
        page_size: int,
        max_seqs: int,
        state: DeviceState | None = None,
        graphs: Graphs | None = None,
        pieces: Pieces | None = None,
        acceptance: float = 0.0,
        deterministic: bool = False,
        rules: Rules | None = None,
    ) -> None:
        self.decoder = decoder
        self.spec: ModelSpec = decoder.spec
        self.groups = groups
        self.pool = pool
        self.backend = backend
        self.sampler = sampler
        self.image = Image(max_seqs, len(groups), page_size)
        self.extras = Extras(decoder, self.image)
        rules = rules or Rules(groups, page_size)
        self.keeping = Keeping(rules, backend, self.image)
        self.filtering = Filtering(rules, backend, self.image, decoder.group)
        self.selecting = Selecting(rules, backend, pool, self.image, state, decoder.device)
        ropes = [decoder.rotary(layer) for layer in range(self.spec.n_layers)]
        self.turning = Turning(backend, pool, self.image, ropes)
        self.state = state
        self.graphs = graphs
        self.pieces = pieces
        self.acceptance = acceptance  #: synthetic, for measurements; 0: drafts are judged
        self.replayed = {"decode": 0, "verify": 0}  #: steps that were one replay
        #: whether trees are verified as such, not as chains
        self.trees = not deterministic and all(group.window is None for group in groups)
        #: most likely tokens that the result keeps of each judged position; 0: nobody asks
        self.alternatives = 0
        #: sees the image rows [R] that choose a token and their final hidden states [R, hidden]
        self.watcher: Callable[[Ints, Tensor], None] | None = None
        self.tap: Tap | None = None  #: sees every named point when set (eager research use)
        self.layers = Layers(self.spec, groups, decoder.device)
        self._flying: InFlight | None = None  # the step handed over last
        self._thread: ThreadPoolExecutor | None = None

    @property
    def captures(self) -> int:
        """Steps that were captured so far; each took as long as dozens of replays."""
        return 0 if self.graphs is None else self.graphs.captures

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step: on a GPU by handing it over, else on this runner's own thread."""
        if self.state is not None:
            return self._hand_over(plan)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvarn-runner")
        return self._thread.submit(self.run, plan)

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one step: rows in and out, page copies, forward, sample."""
        return self._hand_over(plan).result()

    def lay_out(self, plan: StepPlan) -> Batch:
        """Bring the image up to a plan; its rows, for a chain to compute."""
        self._enter()
        self._update(plan)
        return self._batch(plan, range(len(plan.spans)))

    def renew(self, decoder: Decoder) -> None:
        """Compute with other weights of the same shape from the next step on; none is in flight.

        Captured steps read them where the old ones were: there they are copied.
        """
        if self.graphs is None and self.pieces is None:
            self.decoder = self.extras.decoder = decoder
        else:
            self.decoder.become(decoder)

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _hand_over(self, plan: StepPlan) -> InFlight:
        self._enter()
        if plan.drafts and (not self.trees or self.selecting.parts):
            plan = straightened(plan)
        alone = self.state is not None and not self.selecting.parts
        wait_where_seen(plan, self.image, self.sampler, alone)
        if self._flying is not None and self._flying.judges:
            self._flying.result()  # which drafts stand, before anything builds on them
        outcome = StepResult(plan.step, [[] for _ in plan.spans])
        step = InFlight(outcome, time.perf_counter(), self.image, self.pool, self.acceptance)
        before, self._flying = self._flying, step
        self._update(plan)
        if plan.spans:
            rows = self.image.rows([span.seq for span in plan.spans])
            if self.state is not None:
                remember(plan.drafts, self.image, self.state)
            if before is not None and self.sampler.ruled(rows):
                before.result()  # rules look at the tokens so far
            if plan.partial:
                self._compute_partway(plan, step)
            else:
                batch = self._batch(plan, range(len(plan.spans)))
                step.expect(batch)
                self._before(batch)
                self._compute(batch, step, self.keeping.watched(plan, batch, self.decoder.device))
            for move in plan.compactions:
                self.image.compact(move)
        elif self.state is not None:
            self.state.write(self.state.entries(self.image))
        return step

    def _enter(self) -> None:
        """Launch on this runner's GPU: the calling thread may have another."""
        if self.decoder.device.index is not None and self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)

    def _update(self, plan: StepPlan) -> None:
        """Bring the image up to the plan."""
        for seq in plan.stops:
            row = self.image.stop(seq)
            self.keeping.stop(seq)
            if row is not None:
                self.sampler.stop(row)
                self.extras.stop(row)
                self.turning.stop(row)
                self.selecting.stop(row)
        for start in plan.starts:
            self._start(start)
        for edit in plan.edits:
            self.image.edit(edit)
        for seq, draft in plan.drafts.items():
            self.image.draft(seq, draft.tokens, draft.late is not None)
        if plan.copies:
            self.pool.copy(plan.copies)
        if self.state is None:
            self.image.writes.clear()

    def _start(self, start: SeqStart) -> None:
        row = self.image.start(start)
        self.selecting.start(row, start)
        kept = self.keeping.start(start)
        if kept is not None and kept.part.turns:
            self.turning.start(row, kept.part.sinks)
        request = start.request
        params = request.sampling
        key = start.seq if params.seed is None else start.index
        self.sampler.start(row, params, request.eos_ids, start.prompt_len, key)
        self.extras.start(row, request)

    def _batch(self, plan: StepPlan, spans: Sequence[int]) -> Batch:
        """Some spans of a plan, laid out."""
        mine = [plan.spans[i] for i in spans]
        batch = build(mine, self.image, self.spec, self.groups, self.state, plan.drafts)
        if len(mine) < len(plan.spans):
            batch.spans = np.array(spans, np.int64)[batch.spans]
        return batch

    def _before(self, batch: Batch) -> None:
        """What must move in the cache before the step's rows look at it."""
        self.turning.turn(batch)
        self.keeping.fold(batch, self.pool, self.decoder.device)

    def _compute_partway(self, plan: StepPlan, step: InFlight) -> None:
        """Forward and sample where the prompts that are filtered leave after the first layers."""
        device, stages = self.decoder.device, list[Stage]()
        parts = self.filtering.parts(plan, self.spec.n_layers, self._batch)
        last = parts[-1]
        whole = last.end == self.spec.n_layers  # somebody goes through all layers
        if whole:
            step.expect(last.batch)
        self._before(parts[0].batch)
        if self.state is not None:
            self.state.write(self.state.entries(self.image))
        for part in parts:
            watched = self.keeping.watched(plan, part.batch, device)
            selecting = self.selecting.step(part.batch, part is last)
            attend = self._attend(part.batch, watched, selecting)
            if part.asked:
                attend = self.filtering.asking(part, attend, step)
            rows = None if part.rows is None else upload([part.rows], torch.int64, device)[0]
            stages.append(Stage(part.end, attend, rows))
        tokens, positions = self._inputs(parts[0].batch)
        hidden = self.decoder.through(stages, tokens, positions, self.tap)
        if whole:
            self._conclude(last.batch, hidden, step)

    def _compute(self, batch: Batch, step: InFlight, watched: list[list[Watched]]) -> None:
        """Forward and sample, through a captured graph where the step is one that repeats."""
        wanted = self.tap is None and batch.chooses and not self.extras.wanted(batch)
        selecting = self.selecting.step(batch)
        choice = None if selecting is None else selecting.choice()
        wanted = wanted and not watched and (selecting is None or choice is not None)
        plain = self.sampler.plain(batch.rows) and not _drawn(batch)
        if self.graphs is not None and wanted and self.graphs.take(batch, not plain):
            self._replay(self.graphs, batch, choice, plain, step)
            return
        if self.state is not None:
            self.state.write(self.state.entries(self.image))
        self._conclude(batch, self._forward(batch, watched, selecting), step)

    def _replay(
        self, graphs: Graphs, batch: Batch, choice: Choice | None, plain: bool, step: InFlight
    ) -> None:
        """A step whose rows all choose; `plain`: the device chooses, and nobody sees the logits."""
        assert self.state is not None
        rows = batch.row_of
        arrays = self.sampler.parameters(rows, batch.lengths) if plain else None
        entries = self.state.entries(self.image)
        top = self.alternatives if plain and batch.drafts else 0
        found = graphs.run(batch, entries, arrays, self.sampler.filtered(rows), choice, top)
        chosen: Tensor | None = found
        self.replayed["decode" if batch.decodes else "verify"] += 1
        if self.watcher is not None:
            assert graphs.hidden is not None
            self.watcher(rows, graphs.hidden)
        if graphs.top is not None:
            step.keep(graphs.top)
        if plain:
            step.fetch(found)
        else:
            chosen = self._choose(batch, found, step)
        if chosen is not None:
            step.seen = Seen(chosen, graphs.inputs["token"], graphs.inputs["row"])

    def _conclude(self, batch: Batch, hidden: Tensor, step: InFlight) -> None:
        """What the step is for, from the final hidden states [T, hidden]."""
        if self.extras.wanted(batch):
            self.extras.take(batch, hidden, step.outcome)
        if len(batch.logits_at):
            if len(batch.logits_at) < len(hidden):
                hidden = hidden[upload([batch.logits_at], torch.int64, hidden.device)[0]]
            if self.watcher is not None:
                self.watcher(batch.rows[batch.logits_spans], hidden)
            self._choose(batch, self.decoder.logits(hidden, self.tap), step)

    def _forward(
        self, batch: Batch, watched: list[list[Watched]], selecting: SelectingStep | None
    ) -> Tensor:
        """Final hidden states [T, hidden]."""
        attend = self._attend(batch, watched, selecting)
        pieces = self.pieces if attend.takes_projection and self.tap is None else None
        if pieces is not None and pieces.take(len(batch.tokens)):
            return pieces.run(batch, attend)
        tokens, positions = self._inputs(batch)
        return self.decoder.forward(tokens, positions, attend, self.tap)

    def _attend(
        self, batch: Batch, watched: list[list[Watched]], selecting: SelectingStep | None
    ) -> PagedAttend:
        """What every layer attends to."""
        forest = batch.forest
        if forest is None:
            plans: list[Any] = [self.backend.plan(batch.groups[k.group]) for k in self.layers.kinds]
        else:
            plans = [self._tree_plan(batch.groups[k.group], forest) for k in self.layers.kinds]
        whole = self.layers.whole
        if whole is None:  # pages are chosen by whole layers only
            by_layer = self.layers.plans(plans, partial(self._watching, watched))
        else:
            by_layer = [plans[kind] for kind in whole]
            if selecting is not None:
                some = selecting.plans()
                by_layer = [new or plain for new, plain in zip(some, by_layer, strict=True)]
            if watched:
                groups = [self.layers.kinds[kind].group for kind in whole]
                by_layer = [
                    self._watching(watched, group, layer, plan)
                    for layer, (group, plan) in enumerate(zip(groups, by_layer, strict=True))
                ]
        eager = forest is not None or bool(watched)
        return PagedAttend(by_layer, self.pool.cache, self.state is not None and not eager)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens and the positions that they are rotated by [T] on the device."""
        device = self.decoder.device
        if self.state is None:
            tokens, positions = upload([batch.tokens, batch.angles], torch.int64, device)
            return tokens, positions
        from kvarn.kernels.triton.feed import feed

        arrays = [batch.tokens, batch.row_of, batch.angles]
        said, rows, positions = upload(arrays, torch.int32, device)
        return feed(said, rows, self.state.last), positions

    def _watching(self, watched: list[list[Watched]], group: int, layer: int, plan: Any) -> Any:
        """The plan of a layer and group, watched where something of the group will go."""
        mine = watched[group] if watched else []
        return WatchingPlan(plan, self.keeping, layer, mine) if mine else plan

    def _choose(self, batch: Batch, logits: Tensor, step: InFlight) -> Tensor | None:
        """The next token of every row of the logits [R, V]: there [R] if nobody has to see it
        before it is used."""
        rows, lengths = batch.rows[batch.logits_spans], batch.lengths
        drafted = self._drafted(batch, logits.shape[1]) if batch.drafts else None
        if self.alternatives and batch.drafts:
            step.keep(most_likely(logits, self.alternatives))
        alone = drafted is None or drafted.drawn is None
        if self.state is not None and alone and self.sampler.plain(rows):
            arrays = self.sampler.parameters(rows, lengths)
            names = [*arrays, "row"]
            uploaded = upload([*arrays.values(), rows], torch.int32, logits.device)
            parameters = dict(zip(names, uploaded))
            tokens = sample_on_gpu(logits, parameters, self.sampler.filtered(rows))
            if not batch.drafts:
                self.state.set_last(parameters["row"], tokens)
            step.fetch(tokens)
            return tokens
        sampled = self.sampler.sample(logits, rows, lengths, self.image.tokens, drafted)
        step.settle(sampled)
        if self.state is not None and not batch.drafts:
            chosen = np.array(sampled.tokens, np.int64)
            self.state.set_last(*upload([rows, chosen], torch.int32, logits.device))
        return None

    def _drafted(self, batch: Batch, vocab: int) -> Drafted:
        """What the sampler must know of the drafts."""
        first = np.searchsorted(batch.logits_spans, np.arange(len(batch.rows))).tolist()
        found = Drafted(drawn(batch.drafts, first, vocab))
        if batch.forest is None or not self.sampler.ruled(batch.rows):
            return found
        for base, draft in zip(first, batch.drafts):
            if draft is not None and is_tree(draft):
                start = int(batch.lengths[base])
                for row in range(len(draft.tokens) + 1):
                    found.paths[base + row] = (start, path(draft, row))
        return found

    def _tree_plan(self, rows: PagedRows, forest: Forest) -> TreePlan:
        plain = self.backend.plan(rows, lse=True)
        kind, device = self.pool.dtype, self.decoder.device
        return TreePlan(plain, forest, rows.scale, rows.softcap, kind, device)


def _drawn(batch: Batch) -> bool:
    """Whether verification wants more of the logits than their choice."""
    return any(one is not None and one.q is not None for one in batch.drafts)
