"""The session experiment through this engine's own scheduler, KV manager and prefix cache."""

from kvarn.bench.sim_load import ClosedLoop
from kvarn.cluster.fleet import Fleet
from kvarn.cluster.router.round_robin import RoundRobin
from kvarn.cluster.routing import Routing
from kvarn.core.model import GroupSpec
from kvarn.cost.session import SessionModel, Workload
from kvarn.cost.session_steps import SessionSteps
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.run import Record, Tally
from kvarn.sim.simulation import Simulation
from kvarn.workload.trace import Trace, TraceRequest

PAGE = 500  #: positions: divides the prompt, so that all of it can be found again
EACH, WARM = 9, 3  #: sessions of a user; of these, not counted


def engine_rate(model: SessionModel, load: Workload, users: int, fits: int) -> dict[str, float]:
    """Sessions an hour, and the share of later turns whose prompt was not found.

    One request runs at a time, as the formulas have it. Pages hold `fits` users' whole sessions.
    """
    longest = load.context + load.turns * load.answer
    pages = fits * -(-longest // PAGE)
    trace = make_trace(load, users)
    control = build_control(
        [GroupSpec((0,), 1, 1)], [pages], PAGE, "continuous", "hash", "lru",
        Capacity(budget=longest, max_seqs=1, max_len=longest, max_queue=1 << 30),
    )  # fmt: skip
    tally = Tally(keep_gaps=False)
    loop = ClosedLoop(trace)
    instance = Instance("engine", control, SessionSteps(model), tally)
    policy = Routing(RoundRobin(), Fleet(1))
    records = Simulation(loop.first(), [instance], policy, tally, loop.after).run().records
    return _steady(records, load, users)


def make_trace(load: Workload, users: int) -> Trace:
    """Chains of sessions, one after the other by user; every session has a prompt of its own."""
    blocks = load.context // PAGE
    found = []
    for user in range(users):
        parent = None
        for session in range(EACH):
            first = (user * EACH + session) * blocks
            for turn in range(load.turns):
                name = f"{user}.{session}.{turn}"
                found.append(
                    TraceRequest(
                        name, 0.0, load.context + turn * load.answer, load.answer,
                        tuple(range(first, first + blocks)), f"{user}.{session}", turn, parent,
                        load.think if parent else 0.0,
                    )
                )  # fmt: skip
                parent = name
    return Trace("sessions", tuple(found), PAGE)


def _steady(records: list[Record], load: Workload, users: int) -> dict[str, float]:
    """Every user's own rate after the first sessions, summed up."""
    rate = 0.0
    for user in range(users):
        ends = [
            one.end for one in records
            if one.id.startswith(f"{user}.") and one.id.endswith(f".{load.turns - 1}")
        ]  # fmt: skip
        first, last = ends[WARM - 1], ends[-1]
        assert first is not None and last is not None
        rate += 3600.0 * (EACH - WARM) * NS / (last - first)
    later = [
        one for one in records if not one.id.endswith(".0") and int(one.id.split(".")[1]) >= WARM
    ]
    missed = sum(one.cached < load.context // 2 for one in later)
    return {"engine_simulated": rate, "engine_missed": missed / len(later)}
