"""Pipelines on a cluster: stations and instances of the engine under one clock.

The model's stages are requests to the simulated cluster, through its policy, scheduler and caches;
the others queue at stations. A stage begins when all before it have ended, or the first of them:
the others are then dropped, aborted in the model and cancelled at stations. A pipeline of one stage
is a request, and is simulated exactly as one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvarn.cluster.policy import Action, ClusterPolicy, Event, Send
from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.kv.fill import fill
from kvarn.sim.heap import ARRIVAL, COMPLETION, NS, Alarm
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Tally
from kvarn.sim.simulation import Simulation
from kvarn.sim.stations import Station
from kvarn.workload.pipelines import MODEL, Pipeline, Pipelines, Stage
from kvarn.workload.tokens import block_tokens
from kvarn.workload.trace import TraceRequest


@dataclass(slots=True)
class Passage:
    """One pipeline's way. Times in ns; None: not yet, or never."""

    pipeline: Pipeline
    arrival: int
    begun: list[int | None] = field(default_factory=list)  #: by stage
    ended: list[int | None] = field(default_factory=list)  #: by stage
    first: int | None = None  #: first token of the last stage, where that is the model's
    dropped: set[int] = field(default_factory=set)  #: stages that another one overtook
    failed: dict[int, str] = field(default_factory=dict)  #: why, by stage

    @property
    def end(self) -> int | None:
        """When the last of its stages ended, but those that were dropped; None: one has not."""
        ends = [one for i, one in enumerate(self.ended) if i not in self.dropped]
        known = [one for one in ends if one is not None]
        return max(known) if len(known) == len(ends) else None

    @property
    def error(self) -> str:
        """Why it did not come to its end, where a stage failed."""
        return next((why for i, why in self.failed.items() if i not in self.dropped), "")

    def ready(self, place: int) -> bool:
        """Whether a stage may begin, and has not."""
        stage = self.pipeline.stages[place]
        ended = [self.ended[before] is not None for before in stage.after]
        enough = any(ended) if stage.first and ended else all(ended)
        return enough and self.begun[place] is None and place not in self.dropped


@dataclass(slots=True)
class PipelineOutcome:
    """A whole simulation of pipelines."""

    passages: list[Passage]  #: in order of arrival
    model: Outcome  #: of the cluster: a record for each of the model's stages

    def done(self, kind: str | None = None) -> Iterator[Passage]:
        """Those that came to their end, of one kind or of all."""
        for one in self.passages:
            if one.end is not None and kind in (None, one.pipeline.kind):
                yield one


class Staged:
    """One simulation of pipelines."""

    def __init__(
        self,
        load: Pipelines,
        stations: Mapping[str, Station],
        instances: Sequence[Instance],
        policy: ClusterPolicy,
        tally: Tally,
    ) -> None:
        wanted = {stage.where for one in load for stage in one.stages} - {MODEL}
        if missing := wanted - set(stations):
            raise ConfigError(f"no station is called {', '.join(sorted(missing))}")
        fetches = any(stage.fetched for one in load for stage in one.stages)
        if fetches and any(one.coasts for one in instances):
            raise ConfigError("KV arrives between steps: instances that it comes to must not coast")
        self.load, self.stations, self.tally = load, stations, tally
        self._fetched: dict[str, int] = {}
        arriving = _Arriving(policy, instances, self._fetched)
        self.simulation = Simulation((), instances, arriving, tally, self._answered)
        self.heap = self.simulation.heap
        self.passages: dict[str, Passage] = {}
        for one in load:
            self.heap.push(round(one.at * NS), ARRIVAL, Alarm(partial(self._arrive, one)))

    def run(self) -> PipelineOutcome:
        """To the end."""
        model = self.simulation.run()
        for passage in self.passages.values():
            self._note_refused(passage)
            last = self.tally.records.get(_name(passage.pipeline, len(passage.ended) - 1))
            passage.first = last.first if last else None
        return PipelineOutcome(list(self.passages.values()), model)

    def _note_refused(self, passage: Passage) -> None:
        """Stages that no instance took have failed."""
        for place in range(len(passage.ended)):
            record = self.tally.records.get(_name(passage.pipeline, place))
            if record is not None and record.error and place not in passage.dropped:
                passage.failed.setdefault(place, record.error)

    def _arrive(self, pipeline: Pipeline) -> None:
        n, now = len(pipeline.stages), self.heap.now
        passage = Passage(pipeline, now, [None] * n, [None] * n)
        self.passages[pipeline.id] = passage
        for request in self._begin(passage):
            self.simulation.arrived(request)

    def _begin(self, passage: Passage) -> list[Request]:
        """Begin every stage that waits for no other; those of the model are returned."""
        requests, now = list[Request](), self.heap.now
        for place, stage in enumerate(passage.pipeline.stages):
            if not passage.ready(place):
                continue
            passage.begun[place] = now
            if stage.first:
                self._drop_others(passage, place)
            name = _name(passage.pipeline, place)
            if stage.where == MODEL:
                if stage.fetched:
                    self._fetched[name] = stage.fetched
                requests.append(_request(name, stage, now, self.load.block_size))
            else:
                self.stations[stage.where].add(now, name, stage.work)
                self._look(stage.where)
        return requests

    def _drop_others(self, passage: Passage, join: int) -> None:
        """A stage begins that needed one before it: what only led to it is not wanted."""
        ended = [one is not None for one in passage.ended]
        for place in passage.pipeline.unwanted(join, ended) - passage.dropped:
            passage.dropped.add(place)
            stage, name = passage.pipeline.stages[place], _name(passage.pipeline, place)
            if passage.begun[place] is None or place in passage.failed:
                continue
            if stage.where == MODEL:
                self.simulation.abort(name)
            else:
                self.stations[stage.where].cancel(self.heap.now, name)
                self._look(stage.where)

    def _look(self, where: str) -> None:
        """Come back when something happens at a station."""
        end = self.stations[where].next_end()
        if end is not None:
            alarm = Alarm(partial(self._station_due, where, end))
            self.heap.push(max(end, self.heap.now), COMPLETION, alarm)

    def _station_due(self, where: str, end: int) -> None:
        station = self.stations[where]
        if station.next_end() != end:
            return  # what was due has changed since; another alarm is set
        for job in station.finish(self.heap.now):
            for request in self._ended(job):
                self.simulation.arrived(request)
        self._look(where)

    def _answered(self, name: str, now: float) -> list[Request]:
        """The model ended a stage."""
        error = self.tally.records[name].error
        if error:
            owner, _, place = name.rpartition("/")
            self.passages[owner].failed[int(place)] = error
            return []
        return self._ended(name)

    def _ended(self, name: str) -> list[Request]:
        owner, _, place = name.rpartition("/")
        passage = self.passages[owner]
        if int(place) in passage.dropped:
            return []  # it ended with the step in which it was overtaken
        passage.ended[int(place)] = self.heap.now
        return self._begin(passage)


class _Arriving:
    """A policy, and what it sends: KV that has come for a request goes where the request goes."""

    def __init__(
        self, policy: ClusterPolicy, instances: Sequence[Instance], fetched: dict[str, int]
    ) -> None:
        self.policy, self.instances, self.fetched = policy, instances, fetched

    def handle(self, event: Event, now: float) -> list[Action]:
        """The policy's actions."""
        actions = self.policy.handle(event, now)
        for action in actions:
            if isinstance(action, Send) and (n := self.fetched.pop(action.request.id, 0)):
                control = self.instances[action.instance].control
                fill(control.kv, action.request.prompt[:n], now)
        return actions


def _name(pipeline: Pipeline, place: int) -> str:
    return f"{pipeline.id}/{place}"


def _request(name: str, stage: Stage, now: int, block_size: int) -> Request:
    params = SamplingParams(max_tokens=max(1, stage.n_out), ignore_eos=True, temperature=0.0)
    content = TraceRequest(name, now / NS, stage.n_in, stage.n_out, stage.blocks)
    return Request(name, block_tokens(content, block_size), params, arrival=now / NS)
