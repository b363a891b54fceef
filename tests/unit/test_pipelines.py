"""Pipelines of stages: what queueing theory says of stations, and that one stage is a request."""

from random import Random

import pytest

from kvarn.bench import pipeline_study
from kvarn.bench.options import Fleet as Fleet_
from kvarn.bench.sim_load import requests_of
from kvarn.cluster.fleet import Fleet
from kvarn.cluster.router.round_robin import RoundRobin
from kvarn.cluster.routing import Routing
from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.cost.devices import find_device
from kvarn.cost.link import Link
from kvarn.cost.retrieval import VectorIndex
from kvarn.cost.shape import Estimate, StepShape
from kvarn.kv.fill import fill
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.links import SharedLink
from kvarn.sim.pipelines import PipelineOutcome, Staged
from kvarn.sim.run import Tally
from kvarn.sim.simulation import Simulation
from kvarn.sim.stations import BatchServer, Transfers
from kvarn.workload import pipelines as made
from kvarn.workload.generate import by_name
from kvarn.workload.pipelines import MODEL, Pipeline, Pipelines, Stage


class Priced:
    """10 ms a step, 100 us a row."""

    name = "toy"

    def step(self, shape: StepShape) -> Estimate:
        return Estimate(linear=0.01 + 1e-4 * shape.n_tokens, joules=1.0)

    def idle_watts(self) -> float:
        return 0.0


def control(pages=400, size=4, max_seqs=8, max_queue=10_000) -> ControlPlane:
    index = find("prefix", "hash")(size, [None], find("evict", "lru")())
    kv = KVManager([GroupSpec((0,), 1, 8)], [pages], size, index)
    return ControlPlane(find("scheduler", "continuous")(), kv,
                        Capacity(64, max_seqs, pages * size, max_queue))  # fmt: skip


def staged(load, stations=None, n=1, coasts=True, **shape) -> PipelineOutcome:
    tally = Tally()
    instances = [Instance(str(i), control(**shape), Priced(), tally, coasts) for i in range(n)]
    return Staged(load, stations or {}, instances, Routing(RoundRobin(), Fleet(n)), tally).run()


def of_stages(*stages: Stage, n=1, gap=0.0) -> Pipelines:
    return Pipelines(tuple(Pipeline(str(i), i * gap, stages) for i in range(n)), 4)


def test_a_pipeline_of_one_stage_is_a_request():
    trace = by_name("shared-prefix", n=60, rate=3.0, prompts=4, prefix=64.0, n_in=40.0, n_out=30.0,
                    block_size=4)  # fmt: skip
    start = trace.requests[0].at
    tally = Tally()
    instances = [Instance(str(i), control(), Priced(), tally) for i in range(2)]
    plain = Simulation(requests_of(trace), instances, Routing(RoundRobin(), Fleet(2)), tally).run()
    load = made.single(trace)
    load = Pipelines(tuple(Pipeline(p.id, p.at - start, p.stages) for p in load), load.block_size)
    found = staged(load, n=2).model
    kept = ("arrival", "n_in", "n_out", "instance", "first", "last", "end", "cached", "gaps")
    for one, other in zip(plain.records, found.records, strict=True):
        assert [getattr(one, k) for k in kept] == [getattr(other, k) for k in kept]
    assert plain.gaps == found.gaps and plain.end == found.end
    assert [i.control.stats() for i in plain.instances] == [
        i.control.stats() for i in found.instances
    ]


def test_one_server_of_fixed_service_waits_as_pollaczek_and_khinchine_say():
    service, load, n = 0.01, 0.7, 100_000
    rng, at, found = Random(3), 0.0, []
    for i in range(n):
        at += rng.expovariate(load / service)
        found.append(Pipeline(str(i), at, (Stage("server"),)))
    server = BatchServer(lambda works: service)
    staged(Pipelines(tuple(found), 4), {"server": server})
    assert server.served == n
    expected = load * service / (2 * (1 - load))
    assert server.waited / n / NS == pytest.approx(expected, rel=0.02)


def test_two_transfers_on_a_link_take_twice_as_long_and_no_byte_is_lost():
    link = SharedLink(Link("test", 0.0, 1e6, 0.0))
    outcome = staged(of_stages(Stage("link", work=1e6), n=2), {"link": Transfers(link)})
    assert [one.end / NS for one in outcome.done()] == pytest.approx([2.0, 2.0], rel=1e-6)
    assert link.moved == 2e6


def test_batches_wait_for_company_but_not_for_ever():
    seen = []

    def seconds(works):
        seen.append(list(works))
        return 0.1

    server = BatchServer(seconds, most=3, patience=0.5)
    outcome = staged(of_stages(Stage("s", work=2.0), n=4, gap=0.1), {"s": server})
    assert seen == [[2.0] * 3, [2.0]]
    ends = [one.end / NS for one in outcome.done()]
    assert ends == pytest.approx([0.3, 0.3, 0.3, 0.9])  # full at 0.2; the last waits from 0.3 on


def test_least_work_goes_first():
    server = BatchServer(sum, first="least_work")
    works = (3.0, 2.0, 1.0)
    load = Pipelines(
        tuple(Pipeline(str(i), 0.0, (Stage("s", work=w),)) for i, w in enumerate(works)), 4
    )
    ends = [one.end / NS for one in staged(load, {"s": server}).done()]
    assert ends == pytest.approx([3.0, 6.0, 4.0])  # the first found the server free


def test_stages_wait_for_all_before_them():
    load = of_stages(
        Stage("a", work=1.0), Stage("a", work=2.0), Stage(MODEL, (0, 1), n_in=10, n_out=3),
        Stage("a", (2,), work=0.5),
    )  # fmt: skip
    (one,) = staged(load, {"a": BatchServer(sum, workers=2)}).passages
    assert one.begun[2] == 2 * NS and one.begun[3] == one.ended[2]
    assert one.end == one.ended[3] == one.begun[3] + NS // 2


def test_a_pipeline_whose_stage_no_instance_takes_says_why():
    load = of_stages(Stage(MODEL, n_in=10, n_out=3), Stage(MODEL, (0,), n_in=20, n_out=3), n=5)
    passages = staged(load, max_seqs=1, max_queue=1).passages
    assert {bool(one.error) for one in passages} == {True, False}
    for one in passages:
        assert (one.end is None) == bool(one.error)
        assert "queue" in one.error or not one.error


def test_every_pipeline_ends_once_and_every_token_is_there():
    load = made.merged(
        made.branches(6, 2.0, 4, 40, 20, 10, 4, 0), made.tools(5, 2.0, 3, 30, 8, 12, "tool", 4, 0)
    )
    outcome = staged(load, {"tool": BatchServer(lambda works: 0.2, workers=9)}, n=2, pages=900)
    assert len(list(outcome.done())) == len(load) == 11
    asked = sum(s.n_out for one in load for s in one.stages)
    assert sum(one.n_out for one in outcome.model.records) == asked
    for one in outcome.passages:
        assert all(begun <= ended for begun, ended in zip(one.begun, one.ended, strict=True))
    for instance in outcome.model.instances:
        assert instance.control.check_integrity() == []


def test_kv_that_has_come_is_not_computed_again():
    prompt = Stage(MODEL, n_in=80, n_out=4, blocks=tuple(range(20)))
    fetched = Stage(MODEL, (0,), n_in=80, n_out=4, blocks=tuple(range(20)), fetched=60)
    link = Transfers(SharedLink(Link("test", 0.0, 1e6, 0.0)))
    alone = staged(of_stages(prompt), coasts=False)
    helped = staged(of_stages(Stage("link", work=1e3), fetched), {"link": link}, coasts=False)
    assert alone.model.records[0].cached == 0
    assert helped.model.records[0].cached == 60
    spared = alone.passages[0].first - (helped.passages[0].first - NS // 1000)
    assert spared / NS == pytest.approx(60 * 1e-4 + 0.01, rel=0.01)  # rows, and one of two steps


def test_filling_takes_only_what_nobody_holds():
    plane = control(pages=10)
    assert fill(plane.kv, list(range(23)), 0.0) == 20
    assert plane.kv.held(0) == 0 and plane.kv.idle(0) == 5
    assert fill(plane.kv, list(range(20)), 1.0) == 20 and plane.kv.idle(0) == 5
    assert fill(plane.kv, list(range(100, 160)), 2.0) == 0  # 15 pages where there are 10
    assert plane.check_integrity() == []


def test_searching_more_lists_takes_longer():
    index, cpu = VectorIndex(), find_device("cpu")
    wide = VectorIndex(probes=128)
    assert index.seconds(cpu, 1) < index.seconds(cpu, 8) < 8 * index.seconds(cpu, 1)
    assert wide.seconds(cpu, 8) > 1.5 * index.seconds(cpu, 8)


@pytest.mark.parametrize("context", [4096, 16_384])
def test_fetching_beats_computing_where_the_closed_form_says(context):
    fleet = Fleet_(page_size=pipeline_study.PAGE)
    row = pipeline_study.fetching(fleet, context)
    assert row["error"] == pytest.approx(0.0, abs=0.05)
    assert row["crowded"] > row["simulated"]


def test_paths_share_the_kv_of_their_prompt():
    row = pipeline_study.reasoning(Fleet_(page_size=pipeline_study.PAGE), 4)
    assert row["saved"] == pytest.approx(row["prompt_pages"], rel=0.05)
    assert row["first_e2e"] < row["shared_e2e"] < row["alone_e2e"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Pipeline("x", 0.0, (Stage("a", (0,)),)), "may only"),
        (lambda: Pipeline("x", 0.0, ()), "no stage"),
        (lambda: BatchServer(sum, most=0), "at least 1"),
        (lambda: VectorIndex(lists=4, probes=8), "cannot be probed"),
        (lambda: staged(of_stages(Stage("nowhere"))), "no station is called nowhere"),
        (lambda: staged(of_stages(Stage(MODEL, n_in=8, n_out=1, fetched=4))), "must not coast"),
        (lambda: made.branches(1, 1.0, 0, 1, 1, 1, 4, 0), "at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, why):
    with pytest.raises(ConfigError, match=why):
        make()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_branch_is_enough_and_the_others_are_dropped(overlap):
    """Three branches of 5, 20 and 60 tokens: the answer begins with the end of the first."""
    thoughts = [Stage(MODEL, n_in=40, n_out=n, blocks=tuple(range(10))) for n in (60, 5, 20)]
    answer = Stage(MODEL, (0, 1, 2), first=True, n_in=48, n_out=4, blocks=tuple(range(10)))
    load = of_stages(*thoughts, answer)
    tally = Tally()
    instances = [Instance("0", control(), Priced(), tally, overlap=overlap)]
    outcome = Staged(load, {}, instances, Routing(RoundRobin(), Fleet(1)), tally).run()
    (one,) = outcome.passages
    assert one.dropped == {0, 2} and one.error == ""
    assert one.begun[3] == one.ended[1] and one.end == one.ended[3]
    records = {record.id: record for record in outcome.model.records}
    assert [records[f"0/{i}"].error for i in range(4)] == ["aborted", "", "aborted", ""]
    assert records["0/0"].end is None and 5 <= records["0/0"].n_out <= 7
    plane = instances[0].control
    assert plane.kv.held(0) == 0 and plane.check_integrity() == [] and not plane.has_work
    stats = plane.stats()
    assert sum(stats.finished.values()) == 4 and stats.finished["abort"] == 2


@pytest.mark.parametrize("coasts", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_races_end_once_and_what_is_not_dropped_is_whole(n, coasts):
    load = made.race(12, 3.0, 4, 40, 20, 10, 4, 0)
    outcome = staged(load, n=n, coasts=coasts, pages=900)
    assert len(list(outcome.done())) == len(load) == 12
    asked = {f"{p.id}/{i}": s.n_out for p in load for i, s in enumerate(p.stages)}
    assert len(outcome.model.records) == len(asked), "a stage is asked for once"
    for one in outcome.model.records:
        assert one.error in ("", "aborted")
        assert one.n_out == asked[one.id] if not one.error else one.n_out <= asked[one.id]
    assert sum(one.error != "" for one in outcome.model.records) > 12
    for one in outcome.passages:
        shortest = min(s.n_out for s in one.pipeline.stages[:4])
        kept = [i for i in range(4) if i not in one.dropped]
        assert min(one.pipeline.stages[i].n_out for i in kept) == shortest
    for instance in outcome.model.instances:
        assert instance.control.kv.held(0) == 0 and instance.control.check_integrity() == []


def test_steps_taken_together_make_the_same_race():
    load = made.race(12, 3.0, 4, 40, 20, 10, 4, 0)
    one, other = (staged(load, coasts=coasts, pages=900) for coasts in (False, True))
    assert [p.end for p in one.passages] == [p.end for p in other.passages]
    assert [r.n_out for r in one.model.records] == [r.n_out for r in other.model.records]


def test_what_leads_to_a_loser_alone_is_dropped_at_stations_and_links():
    """Ways of two stages race: one waits in a queue, one is on a link, one is being served."""
    link = SharedLink(Link("test", 0.0, 1e6, 0.0))
    fast, slow = BatchServer(sum), BatchServer(sum)
    load = of_stages(
        Stage("fast", work=1.0), Stage("fast", (0,), work=1.0),  # ends at 2 s
        Stage("link", work=9e6), Stage("fast", (2,), work=1.0),
        Stage("slow", work=3.0), Stage("slow", work=5.0),
        Stage("fast", (1, 3, 4, 5), first=True, work=0.5),
    )  # fmt: skip
    stations = {"fast": fast, "slow": slow, "link": Transfers(link)}
    (one,) = staged(load, stations).passages
    assert one.dropped == {2, 3, 4, 5} and one.begun[3] is None
    assert one.end == one.ended[6] == round(2.5 * NS)
    assert link.moved == pytest.approx(2e6) and len(link) == 0
    assert slow.served == 1, "the one that waited was never served"


def test_a_branch_that_somebody_else_waits_for_goes_on():
    load = of_stages(
        Stage("s", work=1.0), Stage("s", work=2.0), Stage("s", (0, 1), first=True, work=1.0),
        Stage("s", (1, 2), work=1.0),
    )  # fmt: skip
    (one,) = staged(load, {"s": BatchServer(sum, workers=4)}).passages
    assert one.dropped == set() and one.ended[1] == 2 * NS and one.end == 3 * NS
