"""Real engines in one process behind a router, driven by asyncio."""

import asyncio
from typing import Any

import pytest

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.local import LocalCluster
from kvarn.cluster.routing import Routing
from kvarn.core.config import resolve
from kvarn.core.errors import QueueFull, RequestError
from kvarn.core.part import find
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engines(tiny_folder):
    options = {"model": tiny_folder("llama"), "load": "random", "dtype": "float32", "pages": 64}
    made = [Engine(resolve(options)) for _ in range(2)]
    yield made
    for engine in made:
        engine.close()


def router(name: str) -> Any:
    part: Any = find("router", name)
    return part(block=16) if name == "prefix_aware" else part()


async def collect(cluster: LocalCluster, request: Request) -> list[int]:
    return [token async for output in cluster.stream(request) for token in output.tokens]


def run(engines: Any, policy: Any, use: Any) -> Any:
    async def main() -> Any:
        cluster = LocalCluster(engines, policy)
        try:
            return await use(cluster)
        finally:
            cluster.close()

    return asyncio.run(main())


@pytest.mark.parametrize("name", ["round_robin", "least_loaded", "prefix_aware"])
def test_answers_are_those_of_one_engine(engines, name):
    prompts = [[3 + i, 5, 7] * 12 for i in range(6)]
    policy = Routing(router(name), Fleet(2))

    async def ask(cluster: LocalCluster) -> Any:
        asked = [collect(cluster, Request(str(i), p, GREEDY)) for i, p in enumerate(prompts)]
        return await asyncio.gather(*asked)

    together = run(engines, policy, ask)
    alone = [
        run(engines[:1], Routing(router("round_robin"), Fleet(1)),
            lambda c, p=p: collect(c, Request("x", p, GREEDY)))
        for p in prompts
    ]  # fmt: skip
    assert together == alone
    assert policy.fleet.requests == [0, 0] and policy.fleet.tokens == [0, 0]
    assert not policy.fleet.open


def test_work_is_spread_and_says_why(engines):
    seen = []

    async def ask(cluster: LocalCluster) -> None:
        asked = [
            asyncio.create_task(collect(cluster, Request(str(i), [i + 1] * 8, GREEDY)))
            for i in range(4)
        ]
        await asyncio.sleep(0)
        seen.extend(cluster.routes.values())
        await asyncio.gather(*asked)

    run(engines, Routing(router("least_loaded"), Fleet(2)), ask)
    assert sorted(place for place, _ in seen) == [0, 0, 1, 1]
    assert all("fewest open" in why for _, why in seen)


def test_a_bad_request_harms_nobody(engines):
    async def ask(cluster: LocalCluster) -> list[int]:
        with pytest.raises(RequestError):
            await collect(cluster, Request("bad", [], GREEDY))
        return await collect(cluster, Request("good", [1, 2, 3], GREEDY))

    policy = Routing(router("round_robin"), Fleet(2))
    assert len(run(engines, policy, ask)) == 6
    assert policy.fleet.requests == [0, 0]


def test_a_full_fleet_refuses(engines):
    async def ask(cluster: LocalCluster) -> None:
        first = asyncio.create_task(collect(cluster, Request("a", [1] * 8, GREEDY)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await collect(cluster, Request("b", [2] * 8, GREEDY))
        assert len(await first) == 6

    run(engines[:1], Routing(router("round_robin"), Fleet(1), most=1), ask)


def test_leaving_early_frees_the_place(engines):
    async def ask(cluster: LocalCluster) -> None:
        long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        async for output in cluster.stream(Request("a", [1] * 8, long)):
            if output.tokens:
                break
        await asyncio.sleep(0.2)

    policy = Routing(router("round_robin"), Fleet(1))
    run(engines[:1], policy, ask)
    assert policy.fleet.requests == [0]
    assert not engines[0].control.seqs
