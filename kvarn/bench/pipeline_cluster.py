"""A simulated cluster for pipelines: one instance of the model, and stations of retrieval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from kvarn.bench import sim_fleet
from kvarn.bench.options import Fleet
from kvarn.bench.stats import percentile
from kvarn.cluster import fleet
from kvarn.cluster.router.round_robin import RoundRobin
from kvarn.cluster.routing import Routing
from kvarn.cost.build import cost_model
from kvarn.cost.devices import find_device
from kvarn.cost.retrieval import VectorIndex
from kvarn.cost.shape import CostModel, StepShape
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.pipelines import PipelineOutcome, Staged
from kvarn.sim.run import Tally
from kvarn.sim.stations import BatchServer, Station
from kvarn.workload.pipelines import Pipelines, Stage
from kvarn.workload.trace import Trace

PAGE = 16  #: positions
QUESTION, CANDIDATE = 64, 128  #: of an embedded question; of a reranked pair [tokens]
CANDIDATES = 25  #: that a search hands to the reranker

#: a question is embedded, looked up and its finds are ranked anew before the model reads them
RAG = (
    Stage("embed", work=QUESTION), Stage("search", work=1.0),
    Stage("rerank", work=CANDIDATES * CANDIDATE),
)  # fmt: skip


@dataclass(slots=True)
class Cluster:
    """What pipelines run on."""

    fleet: Fleet
    stations: Mapping[str, Station] = field(default_factory=dict)
    cost: CostModel | None = None  #: None: as the fleet says

    def run(self, load: Pipelines, coasts: bool = True, pages: bool = False) -> PipelineOutcome:
        """Simulate; `pages` keeps how many each instance holds over time."""
        spec, one = sim_fleet.find_spec(self.fleet.model), self.fleet
        cost = self.cost or sim_fleet.price_list(one, spec)
        tally = Tally(keep_gaps=False, page_use={} if pages else None)
        empty = Trace("pipelines", ())
        instances = [
            Instance(
                f"{spec.name}-{i}", sim_fleet.make_control(one, spec, empty), cost, tally, coasts
            )
            for i in range(one.instances)
        ]
        policy = Routing(RoundRobin(), fleet.Fleet(one.instances))
        return Staged(load, self.stations, instances, policy, tally).run()


def retrieval(most: int, patience: float = 0.0) -> dict[str, Station]:
    """Stations that embed (135M, L4), search (IVF-PQ, CPU) and rerank (1.7B, L4).

    Sizes and devices are our choice; each takes up to `most` jobs at once.
    """
    small, large = (
        cost_model(sim_fleet.find_spec(name), device="L4")
        for name in ("smollm2-135m", "smollm2-1.7b")
    )
    index, cpu = VectorIndex(), find_device("cpu")

    def read(works: Sequence[float]) -> float:
        chunks = tuple((int(work), int(work)) for work in works)
        return small.step(StepShape(chunks)).seconds

    def read_pairs(works: Sequence[float]) -> float:
        pairs = ((CANDIDATE, CANDIDATE),) * (int(sum(works)) // CANDIDATE)
        return large.step(StepShape(pairs, n_logits=len(pairs))).seconds

    def look_up(works: Sequence[float]) -> float:
        return index.seconds(cpu, len(works))

    parts = {"embed": read, "search": look_up, "rerank": read_pairs}
    return {
        name: BatchServer(seconds, most=most, patience=patience) for name, seconds in parts.items()
    }


def figures(outcome: PipelineOutcome, kind: str) -> dict[str, Any]:
    """Latencies of one kind of pipeline [s]; first tokens are those of the last stage."""
    done = list(outcome.done(kind))
    ends = [(one.end - one.arrival) / NS for one in done if one.end is not None]
    firsts = [(one.first - one.arrival) / NS for one in done if one.first is not None]
    return {
        "completed": len(done),
        "mean_e2e": fmean(ends), "p99_e2e": percentile(sorted(ends), 99),
        "mean_ttft": fmean(firsts), "p99_ttft": percentile(sorted(firsts), 99),
    }  # fmt: skip


def most_pages(outcome: PipelineOutcome) -> int:
    """The most KV pages that an instance ever held."""
    assert outcome.model.page_use is not None
    return max(most for use in outcome.model.page_use.values() for most, _ in use.slots.values())
