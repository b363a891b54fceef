"""Page ownership under everything that can happen to a sequence: no leak, no double owner."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn.core.keep import ENDLESS, Filter, Keep
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.core.plan import StepPlan, StepResult
from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.kv.prefix import NO_PAGE
from kvarn.schedule.continuous import Continuous
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.instance import choices

PAGE = 4
SYSTEM_PROMPTS = [[1] * 20, [1] * 12 + [2] * 20, [3] * 40, []]
LAYOUTS = [(None,), (6,), (None, 10), (None, None, 7, 12)]
SINKS = [0, 3, 9]  #: of every window


#: by the request's `sparsity`, which says nothing else here; one rule for every group
KEEPS = {
    "small": Keep(10, 4),
    "watched": Keep(16, 5, watch=3),
    "all watched": Keep(13, 13, watch=ENDLESS),
    "streamed": Keep(14, 9, streamed=True),
    "turning": Keep(16, 7, turns=True),
}
#: likewise: the first group's layer chooses, or the last one's
FILTERS = {"filtered": Filter(1, 12, 1, 4), "by the last": Filter(9, 9, 0, 1)}


def make_control(
    prefix: str, evict: str, windows: tuple[int | None, ...], pages: int, sinks: int = 0
) -> ControlPlane:
    groups = [
        GroupSpec((layer,), 1, 8, window, sinks=sinks if window else 0)
        for layer, window in enumerate(windows)
    ]
    index = None
    if prefix != "none":
        stay = [group.sink_pages(PAGE) for group in groups]
        index = find("prefix", prefix)(PAGE, windows, find("evict", evict)(), stay)  # type: ignore[call-arg]
    kv = KVManager(groups, [pages] * len(groups), PAGE, index)  # type: ignore[arg-type]

    def keeps(request: Request) -> tuple[Keep, ...]:
        if request.sparsity not in KEEPS or any(windows):
            return ()
        keep = KEEPS[request.sparsity]  # of the first group; the others have smaller budgets
        return tuple(replace(keep, budget=keep.budget - i, recent=3) for i in range(len(groups)))

    def filters(request: Request) -> Filter | None:
        rule = FILTERS.get(request.sparsity or "")
        return rule if rule is not None and len(request.prompt) > rule.budget else None

    limits = Capacity(32, 8, 160, 10_000)
    return ControlPlane(Continuous(), kv, limits, keeps, filters=filters)


def fake_result(control: ControlPlane, plan: StepPlan, chance: random.Random) -> StepResult:
    """What a model would give: one token for each span that wants one."""
    tokens = [[chance.randint(5, 9)] if span.wants_logits else [] for span in plan.spans]
    return StepResult(plan.step, tokens, choices(control, plan))


def writable(control: ControlPlane, page: int) -> bool:
    """Whether nobody else may see what is written to a page of the first group."""
    return control.kv.refs[0][page] == 1 and not control.kv.indexed[0][page]


class Pages(RuleBasedStateMachine):
    """Requests come, run with one step in flight, fork, are preempted, aborted, and finish."""

    @initialize(
        prefix=st.sampled_from(["hash", "radix", "none"]),
        evict=st.sampled_from(["lru", "lfu"]),
        windows=st.sampled_from(LAYOUTS),
        pages=st.integers(42, 80),
        sinks=st.sampled_from(SINKS),
    )
    def begin(
        self, prefix: str, evict: str, windows: tuple[int | None, ...], pages: int, sinks: int
    ) -> None:
        self.control = make_control(prefix, evict, windows, pages, sinks)
        self.chance = random.Random(0)
        self.now = 0.0
        self.in_flight: StepPlan | None = None
        self.ids: list[str] = []

    @rule(
        system=st.sampled_from(SYSTEM_PROMPTS),
        own=st.lists(st.integers(5, 9), min_size=1, max_size=20),
        outputs=st.integers(1, 60),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(0, 1),
        keep=st.sampled_from([None, None, *KEEPS, *FILTERS]),
    )
    def add(
        self, system: list[int], own: list[int], outputs: int, n: int, priority: int,
        keep: str | None,
    ) -> None:  # fmt: skip
        name = f"r{len(self.ids)}"
        self.ids.append(name)
        sampling = SamplingParams(max_tokens=outputs, n=n, stop_token_ids=(9,))
        prompt = system + own
        self.control.add(Request(name, prompt, sampling, priority, self.now, sparsity=keep))

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0
            plan = self.control.plan(self.now)
            assert plan.n_tokens <= 32
            if self.in_flight is not None:
                result = fake_result(self.control, self.in_flight, self.chance)
                self.control.apply(self.in_flight, result, self.now)
            self.in_flight = plan

    @rule(which=st.integers(0, 10_000))
    def abort(self, which: int) -> None:
        if self.ids:
            self.control.abort(self.ids[which % len(self.ids)], self.now)

    @rule()
    def clear_cache(self) -> None:
        self.control.kv.clear(self.now)

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def break_step(self) -> None:
        assert self.in_flight is not None
        self.control.fail([self.in_flight], self.now)
        self.in_flight = None

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "control"):
            return
        assert self.control.check_integrity() == []
        for seq in self.control.queues.running:
            for table in seq.tables:
                held = [page for page in table if page >= 0]
                assert len(held) == len(set(held))
            assert seq.computed <= seq.capacity
            if seq.filter is None:
                self.next_row_has_what_it_sees(seq)
            for keep, table in zip(seq.keep[:1], seq.tables):
                if seq.computed < keep.since(seq.prompt_len):
                    assert len(table) * PAGE >= seq.computed
                if seq.computed > keep.since(seq.prompt_len):
                    assert len(table) == -(-keep.budget // PAGE)
                    ring = table[(keep.budget - keep.recent) // PAGE :]
                    assert all(writable(self.control, page) for page in ring)

    def next_row_has_what_it_sees(self, seq: Seq) -> None:
        """The pages of its window and of the sinks."""
        end = -(-seq.computed // PAGE)
        for spec, table in zip(self.control.kv.groups, seq.tables):
            if spec.window is not None:
                first = max(0, seq.computed - spec.window + 1) // PAGE
                stay = table[: min(end, spec.sink_pages(PAGE))]
                assert NO_PAGE not in table[first:end] + stay

    def teardown(self) -> None:
        if not hasattr(self, "control"):
            return
        for name in self.ids:
            self.control.abort(name, self.now)
        kv = self.control.kv
        assert all(kv.held(group) == 0 for group in range(len(kv.groups)))
        kv.clear(self.now)
        assert [len(free) for free in kv.free] == kv.pages


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("prefix", ["hash", "radix", "none"])
@pytest.mark.parametrize("windows", [*LAYOUTS, (None, None)])
@pytest.mark.parametrize("sinks", [0, 9])
def test_ten_thousand_operations(prefix: str, windows: tuple[int | None, ...], sinks: int) -> None:
    """A long life: no leak over 10,000 adds, aborts and steps together."""
    chance = random.Random(7)
    control = make_control(prefix, "lru", windows, 100, sinks)
    in_flight: StepPlan | None = None
    operations = added = 0
    while operations < 10_000:
        operations += 1
        now = float(operations)
        if chance.random() < 0.25:
            added += 1
            operations += 1
            prompt = chance.choice(SYSTEM_PROMPTS) + [chance.randint(5, 9)] * chance.randint(1, 30)
            sampling = SamplingParams(max_tokens=chance.randint(1, 50), n=chance.choice([1, 1, 3]))
            keep = chance.choice([None, *KEEPS, *FILTERS])
            priority = chance.choice([0, 1])
            control.add(Request(f"r{added}", prompt, sampling, priority, now, sparsity=keep))
        if chance.random() < 0.03 and added:
            operations += 1
            control.abort(f"r{chance.randint(1, added)}", now)
        plan = control.plan(now)
        if in_flight is not None:
            control.apply(in_flight, fake_result(control, in_flight, chance), now)
        in_flight = plan
        if operations % 500 < 2:
            assert control.check_integrity() == []
    for i in range(1, added + 1):
        control.abort(f"r{i}", 0.0)
    assert control.check_integrity() == []
    assert all(control.kv.held(group) == 0 for group in range(len(control.kv.groups)))


def test_integrity_check_repairs() -> None:
    """A damaged book is described and put right; nothing raises."""
    control = make_control("hash", "lru", (None,), 50)
    control.add(Request("r", [1] * 20, SamplingParams(max_tokens=4)))
    control.plan(0.0)
    lost = control.kv.free[0].pop()
    control.kv.refs[0][control.queues.running[0].tables[0][0]] += 1
    problems = control.check_integrity()
    assert len(problems) == 2, problems
    assert control.check_integrity() == []
    assert lost in control.kv.free[0]
