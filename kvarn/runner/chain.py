"""Captured chains: a drafting model's greedy tokens for every sequence, pass after pass, in one
replay.

A pass of a small drafter takes a device less time than a step takes the host. So the passes of a
draft are one graph: each takes the tokens that the one before it chose from the device. A head that
judges drafted tokens does so in the same graph, behind the last pass: nobody waits for its word
within a replay, and all passes at once cost it what one would. What is known beforehand
(positions, slots, attention's work items) the host lays out for all passes at once. To capture a
chain takes a tenth of a second, so there are few: numbers of sequences are padded to powers of two,
and a chain that is longer than need be does at first. The KV of a draft's last token is not
computed. Where the draft is accepted whole, the next one begins with two rows for that sequence,
this token and the one behind it.

A chain may be launched behind a step that verifies the draft before, when nobody knows yet what of
it stands. It is laid out as if nothing did, with two rows for every sequence; what the device finds
to stand moves it on (`kvarn.kernels.triton.standing`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.attention import GraphPlan, PagedRows
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.upload import download
from kvarn.runner.batch import Batch
from kvarn.runner.graphs import MOST_GRAPHS, Graphs, Inputs, Ints, Replay, idle
from kvarn.runner.heads import Kind
from kvarn.runner.image import Image

OFTEN = 8  #: rounds of a length that a longer chain serves before one of its own is captured
#: tokens, their log-probabilities, and the judge's word on the token before each; 1: no judge
Said = list[tuple[int, float, float]]
#: probability that tokens [n] are accepted, of the final hidden states [n, hidden] where they were
#: consumed and of the drafter's own log-probability of each
Judge = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class Chain:
    """One captured chain."""

    inputs: Inputs
    size: int  #: most sequences
    plans: list[list[GraphPlan]]  #: by pass, of each kind of layers
    parts: list[Tensor] = field(default_factory=list)  #: by kind, what moves on in each pass
    replay: Replay | None = None


class Saying:
    """What a replay says of some sequences, when the device has come to it."""

    def __init__(self, said: Tensor, most: list[int], began: Any) -> None:
        """`said` [2 or 3, passes, size]: the first `most[s]` of column s are of sequence s.
        `began`: the event before the replay, if any."""
        self.ids, self.most, self._began = said[0], most, began
        self._there, self._done = download(said)

    def _numbers(self) -> NDArray[np.float64]:
        """[2 or 3, passes, size], once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._there.numpy().astype(np.float64)

    @cached_property
    def words(self) -> list[Said]:
        """By sequence; a fault of the logits ends a draft. Waits for it."""
        found = self._numbers()
        return [_draft(found[:, :count, s]) for s, count in enumerate(self.most)]

    @cached_property
    def lists(self) -> list[tuple[list[int], list[float]]]:
        """By sequence: its tokens, and how sure the drafter is of each (0: a fault). Waits."""
        ids, sure, *_ = self._numbers()[:, :, : len(self.most)].transpose(0, 2, 1)
        rows = zip(ids.astype(np.int64).tolist(), np.nan_to_num(np.exp(sure)).tolist())
        return [(a[:n], b[:n]) for n, (a, b) in zip(self.most, rows)]

    @cached_property
    def seconds(self) -> float:
        """What it took the device; 0 where nobody measured. Waits for it."""
        if self._began is None:
            return 0.0
        self._done.synchronize()
        return float(self._began.elapsed_time(self._done)) / 1e3


@dataclass(slots=True)
class LateDraft:
    """What a replay will say of one sequence; see `kvarn.core.plan.Late`."""

    saying: Saying
    at: int  #: which sequence of it

    @property
    def seconds(self) -> float:
        """See `Saying.seconds`."""
        return self.saying.seconds

    def said(self) -> tuple[list[int], list[float]]:
        """Its tokens, and how sure the drafter is of each; waits for them."""
        return self.saying.lists[self.at]


@dataclass(slots=True)
class Chains:
    """The captured chains of a runner, on the device state of its captured steps."""

    graphs: Graphs
    image: Image
    judge: Judge | None = None
    #: by size, rows of the first pass and attention, by passes; the newest use comes last
    found: dict[Any, dict[int, Chain]] = field(default_factory=dict)
    asked: Counter[Any] = field(default_factory=Counter)  #: rounds, by the same

    @torch.inference_mode()
    def launch(
        self, batch: Batch, most: Ints, own: list[float], movers: Sequence[int] = ()
    ) -> Saying:
        """At most `most[s]` tokens (1 or more) behind each span s, one row or two, in their order.

        `own[s]`: the drafter's probability of the span's last token, where it is a drafted one. The
        table entries of as many positions are there. `movers`: the image rows of spans of two rows
        that move on by what the state says, with table entries for that, too.
        """
        self.graphs.state.write(self.graphs.state.entries(self.image))
        size = min(1 << (len(batch.rows) - 1).bit_length(), self.graphs.sizes[-1])
        passes = int(most.max())
        rows = [batch.groups] + [self._ahead(batch, most, by) for by in range(1, max(passes, 2))]
        chain = self._find(size, batch, rows, passes)
        rows += [self._ahead(batch, most, by) for by in range(len(rows), len(chain.plans))]
        self._fill(chain, batch, most, own, rows, movers)
        began = None
        if self.graphs.state.last.is_cuda:
            began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            began.record()
        chain.inputs.send()
        assert chain.replay is not None
        # a copy: there may be another replay before a step has read this one's tokens
        return Saying(chain.replay().clone(), most.tolist(), began)

    def _find(self, size: int, batch: Batch, rows: list[list[PagedRows]], passes: int) -> Chain:
        """A chain for these rows, by pass and group: its own, or a longer one while it is new."""
        kinds, first = self.graphs.layers.kinds, size if batch.decodes else 2 * size
        # of each kind the later pass that needs most: split spans, say, leave room for whole ones
        like = [[rows[0][kind.group] for kind in kinds]]
        like.append([max((one[k.group] for one in rows[1:]), key=self._key_of(k)) for k in kinds])
        keys = [self._key_of(kind)(one) for part in like for kind, one in zip(kinds, part)]
        key = (size, first, *keys)
        lengths = self.found.pop(key, None) or {}
        self.found[key] = lengths
        self.asked[key, passes] += 1
        if passes not in lengths:
            longer = [count for count in lengths if count > passes]
            if longer and self.asked[key, passes] < OFTEN:
                return lengths[min(longer)]
            self._make_room()
            lengths[passes] = self._capture(size, first, batch, like, passes)
        return lengths[passes]

    def _make_room(self) -> None:
        """Drop what was used longest ago, where there are as many as may be."""
        while sum(map(len, self.found.values())) >= MOST_GRAPHS and len(self.found) > 1:
            del self.found[next(iter(self.found))]

    def _ahead(self, batch: Batch, most: Ints, by: int) -> list[PagedRows]:
        """The rows of a later pass, by group: `by` positions on, or idle in their last place."""
        image, at = self.image, batch.ends - 1 + np.minimum(by, most - 1)
        size, found, one = image.page_size, list[PagedRows](), np.arange(len(at) + 1)
        for table, rows in zip(image.tables, batch.groups, strict=True):
            slots = table[batch.rows, at // size].astype(np.int64) * size + at % size
            slots[most <= by] = -1
            found.append(replace(rows, indptr=one, start=at, slots=slots))
        return found

    def _key_of(self, kind: Kind) -> Callable[[PagedRows], Any]:
        """What attention's launches depend on, of rows of a kind of layers."""
        backend, dim = self.graphs.backend, self.graphs.decoder.spec.head_dim
        return lambda rows: backend.graph_key(rows, kind.n_heads, kind.n_kv_heads, dim)

    def _capture(
        self, size: int, first: int, batch: Batch, like: list[list[PagedRows]], passes: int
    ) -> Chain:
        """A chain whose attention has room for rows `like` these, by kind, in the first pass, of
        `first` rows, and in every later one."""
        graphs, dim = self.graphs, self.graphs.decoder.spec.head_dim
        kinds = graphs.layers.kinds
        sizes = {"token": first, "row": first, "last": size, "own": size, "mover": size}
        plans = list[list[GraphPlan]]()
        for by in range(passes):
            sizes[f"position_{by}"] = sizes[f"place_{by}"] = count = size if by else first
            plans.append([])
            for at, kind in enumerate(kinds):
                shape = count, kind.n_heads, kind.n_kv_heads, dim
                plan = graphs.backend.graph_plan(*shape, like[min(by, 1)][at])
                sizes |= {f"{name}_{by}_{at}": needs for name, needs in plan.sizes.items()}
                plans[by].append(plan)
        chain = Chain(Inputs(sizes, graphs.decoder.device), size, plans)
        for by, made in enumerate(plans):
            for at, (plan, kind) in enumerate(zip(made, kinds)):
                there = {name: chain.inputs.device[f"{name}_{by}_{at}"] for name in plan.sizes}
                plan.bind(there, graphs.state.tables[kind.group])
        chain.parts = [_parts(chain.inputs, sizes, at, passes, size) for at in range(len(kinds))]
        nobody = idle(batch)
        self._fill(chain, nobody, nobody.positions, [], [nobody.groups] * passes, ())
        chain.inputs.send()
        graphs.captures += 1
        chain.replay = graphs.capture(lambda: self._body(chain))
        return chain

    def _fill(
        self, chain: Chain, batch: Batch, most: Ints, own: list[float],
        rows: list[list[PagedRows]], movers: Sequence[int],
    ) -> None:  # fmt: skip
        """Write a chain into the host's arrays; what is left over idles."""
        host, last = chain.inputs.host(), batch.indptr[1 : len(batch.rows) + 1] - 1
        _put(host["token"], batch.tokens, 0)
        _put(host["row"], batch.row_of, -1)
        _put(host["last"], last, 0)
        host["own"].view(np.float32)[: len(own)] = np.log(own)
        _put(host["mover"], np.array(movers, np.int64), -1)
        for by, (plans, groups) in enumerate(zip(chain.plans, rows)):
            angles = batch.angles[last] + np.minimum(by, most - 1) if by else batch.angles
            _put(host[f"position_{by}"], angles, 0)
            for at, (plan, kind) in enumerate(zip(plans, self.graphs.layers.kinds)):
                arrays = {name: host[f"{name}_{by}_{at}"] for name in plan.sizes}
                plan.fill(groups[kind.group], arrays)

    def _body(self, chain: Chain) -> Tensor:
        """Every pass on the device: ids, log-probabilities and, where there is a judge, its words
        [2 or 3, passes, size] in fp32."""
        from kvarn.kernels.triton.feed import feed
        from kvarn.kernels.triton.standing import advance

        graphs, inputs = self.graphs, chain.inputs.device
        state, page = graphs.state, self.image.page_size
        for kind, part in zip(graphs.layers.kinds, chain.parts, strict=True):
            table = state.tables[kind.group]
            advance(
                chain.inputs.buffer, part, inputs["mover"], state.moved, table, state.width, page
            )
        tokens = feed(inputs["token"], inputs["row"], graphs.state.last)
        # log-probabilities of what the first pass consumes, then of what each pass says
        ids, sure = list[Tensor](), [inputs["own"].view(torch.float32)]
        states = list[Tensor]()  # final ones of each pass
        for by, plans in enumerate(chain.plans):
            attend = PagedAttend(
                graphs.layers.plans(plans), graphs.pool.cache, takes_projection=True
            )
            hidden = graphs.decoder.forward(tokens, inputs[f"place_{by}"], attend)
            if len(hidden) > chain.size:
                hidden = hidden[inputs["last"].long()]
            best = graphs.decoder.logits(hidden).log_softmax(-1).max(-1)
            tokens = best.indices
            ids.append(tokens.float())  # exact below 2^24
            sure.append(best.values)
            states.append(hidden)
        logprobs = torch.stack(sure)
        said = [torch.stack(ids), logprobs[1:]]
        if self.judge is not None:
            words = self.judge(torch.cat(states), logprobs[:-1].flatten())
            said.append(words.view_as(said[0]))
        return torch.stack(said)


def _parts(inputs: Inputs, sizes: dict[str, int], kind: int, passes: int, size: int) -> Tensor:
    """What moves on in the passes of a chain, for one kind of layers."""
    from kvarn.kernels.triton.standing import parts

    lines = []
    for by in range(passes):
        rows, items = sizes[f"position_{by}"], f"items_{by}_{kind}"
        names = f"position_{by}", f"place_{by}", f"slots_{by}_{kind}", items
        lines.append([*(inputs.starts[n] for n in names), rows, sizes[items] // 8, rows // size])
    return parts(lines, inputs.buffer.device)


def _put(there: NDArray[np.int32], values: Ints, other: int) -> None:
    """The first ones, and what the rest is."""
    there[: len(values)], there[len(values) :] = values, other


def _draft(said: NDArray[np.float64]) -> Said:
    """Of what the passes [2 or 3, passes] said, what comes before a log-probability that is no
    number."""
    ids, sure, *words = said.tolist()
    found = list(zip(map(int, ids), sure, *words or [[1.0] * len(ids)]))
    faulty = next((i for i, one in enumerate(found) if one[1] != one[1]), len(found))
    return found[:faulty]
