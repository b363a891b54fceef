"""What every router promises, whatever it knows: one place for a new one is one line here."""

from random import Random
from typing import Any

import pytest

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.policy import Arrived, Finished, Refuse, Send, Started
from kvarn.cluster.routing import Routing
from kvarn.core.part import find, known
from kvarn.core.request import Request

ROUTERS = sorted(name for kind, name in known() if kind == "router")


def make(name: str, most: int = 1 << 30, size: int = 5) -> Routing:
    router: Any = find("router", name)()
    return Routing(router, Fleet(size), most)


def requests(n: int) -> list[Request]:
    rng = Random(3)
    shared = [[group] * 1024 for group in range(4)]
    return [
        Request(str(i), shared[rng.randrange(4)] + [100 + i] * rng.randrange(1, 900))
        for i in range(n)
    ]


def drive(policy: Routing, n: int = 120) -> list[tuple[int, str]]:
    """Arrivals, first tokens and ends in a random but fixed order; where each request went."""
    rng, went, open_ = Random(5), [], list[tuple[str, int]]()
    for i, request in enumerate(requests(n)):
        (action,) = policy.handle(Arrived(request), float(i))
        assert isinstance(action, Send) and action.request is request
        assert 0 <= action.instance < policy.fleet.size and action.why
        went.append((action.instance, action.why))
        open_.append((request.id, action.instance))
        if rng.random() < 0.7:
            key, place = open_.pop(rng.randrange(len(open_)))
            assert policy.handle(Started(key, place), float(i)) == []
            assert policy.handle(Finished(key, place), float(i)) == []
    for key, place in open_:
        policy.handle(Finished(key, place), float(n))
    return went


@pytest.mark.parametrize("name", ROUTERS)
def test_same_events_same_choices(name):
    assert drive(make(name)) == drive(make(name))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_books_are_empty_at_the_end(name):
    policy = make(name)
    drive(policy)
    assert policy.fleet.requests == policy.fleet.tokens == [0] * 5
    assert not policy.fleet.open


@pytest.mark.parametrize("name", ROUTERS)
def test_every_instance_works(name):
    assert {place for place, _ in drive(make(name))} == set(range(5))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_full_fleet_refuses_and_takes_again(name):
    policy = make(name, most=1, size=2)
    asked = requests(4)
    sent = [policy.handle(Arrived(one), 0.0)[0] for one in asked]
    refused = [action for action in sent if isinstance(action, Refuse)]
    assert refused and all(action.retry_after > 0 for action in refused)
    first = sent[0]
    assert isinstance(first, Send)
    policy.handle(Finished(asked[0].id, first.instance), 1.0)
    (again,) = policy.handle(Arrived(asked[3]), 1.0)
    assert isinstance(again, Send)


def test_prefix_aware_keeps_a_prefix_together():
    policy = make("prefix_aware")
    places: dict[int, set[int]] = {}
    for i, request in enumerate(requests(60)):
        (action,) = policy.handle(Arrived(request), float(i))
        assert isinstance(action, Send)
        places.setdefault(request.prompt[0], set()).add(action.instance)
        policy.handle(Finished(request.id, action.instance), i + 0.5)
    assert all(len(found) == 1 for found in places.values())


def test_the_fleet_knows_who_has_least():
    """The heap with outdated loads answers as a scan over all instances does."""
    rng, fleet, sent = Random(0), Fleet(5), []
    for i in range(3000):
        scan = min(range(5), key=lambda at: (fleet.requests[at], fleet.tokens[at], at))
        assert fleet.least() == scan
        kind = rng.randrange(3)
        if kind == 0 or not sent:
            sent.append(str(i))
            fleet.sent(str(i), rng.randrange(5), rng.randrange(9))
        elif kind == 1:
            fleet.started(rng.choice(sent))
        else:
            fleet.finished(sent.pop(rng.randrange(len(sent))))
