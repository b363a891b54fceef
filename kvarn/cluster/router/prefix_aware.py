"""Prefix-aware routing: the instance where the least prompt is left to compute, its queue included.

The router keeps its own picture of who holds what: the content ids of the blocks that it sent where
(the same chained hashes as the prefix index, kvarn/kv/prefix/hashed.py). The picture may be out of
date (an instance evicts on its own), which costs a miss and never a wrong answer; entries beyond
`remembered` blocks an instance leave in order of last use. Follows the cost of Mooncake's
conductor (arXiv 2407.00079, algorithm 1) without transfers: a prompt's uncached tokens plus the
tokens queued before it; a running request counts as `per_request` tokens, since it slows the rest.

Regime: prompts that share prefixes (chat, agents, documents). Without any it is `least_loaded` by
tokens, at the cost of hashing each prompt.
"""

from collections import OrderedDict

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.router import Choice
from kvarn.core.part import Part
from kvarn.core.request import Request
from kvarn.kv.prefix.hashed import content_id


class PrefixAware(Part):
    """Least prompt left to compute, queue included."""

    name, kind, paper = "prefix_aware", "router", "2407.00079"
    regime = "Shared prefixes. Without any, the same as least_loaded, and dearer."

    def __init__(self, block: int = 512, remembered: int = 1 << 16, per_request: int = 64) -> None:
        """`block`: positions of an id [tokens]; `remembered`: blocks known of each instance."""
        self.block = block
        self.remembered = remembered
        self.per_request = per_request
        self._holders: dict[bytes, set[int]] = {}
        self._known: dict[int, OrderedDict[bytes, None]] = {}

    def choose(self, request: Request, fleet: Fleet, now: float) -> Choice:
        """The cheapest of those that hold some of the prompt, and of those that hold nothing."""
        ids = self._ids(request)
        depth = self._depths(ids)
        n_prompt = len(request.prompt)

        def cost(instance: int) -> tuple[int, int]:
            left = n_prompt - depth.get(instance, 0) * self.block
            load = fleet.tokens[instance] + self.per_request * fleet.requests[instance]
            return left + load, self._remembered(instance)

        candidates = {*depth, self._idlest(fleet)}
        instance = min(sorted(candidates), key=cost)
        held = min(depth.get(instance, 0) * self.block, n_prompt)
        why = f"{held} of {n_prompt} tokens held, {fleet.tokens[instance]} queued before it"
        self._remember(instance, ids)
        return Choice(instance, n_prompt - held, why)

    def _idlest(self, fleet: Fleet) -> int:
        """The least loaded; among equals the one that holds least, so that content spreads."""
        loads = [t + self.per_request * n for t, n in zip(fleet.tokens, fleet.requests)]
        least = min(loads)
        return min((i for i, n in enumerate(loads) if n == least), key=self._remembered)

    def _remembered(self, instance: int) -> int:
        return len(self._known.get(instance, ()))

    def _ids(self, request: Request) -> list[bytes]:
        """Chained ids of the whole blocks that a prefix hit could serve."""
        ids: list[bytes] = []
        prompt = request.prompt
        parent: bytes | str = request.cache_salt
        for at in range(0, (len(prompt) - 1) // self.block * self.block, self.block):
            key = parent = content_id(parent, prompt[at : at + self.block])
            ids.append(key)
        return ids

    def _depths(self, ids: list[bytes]) -> dict[int, int]:
        """Leading blocks held, by instance; those that hold none are left out."""
        depth: dict[int, int] = {}
        holders: set[int] = set()
        for i, key in enumerate(ids):
            found = self._holders.get(key, set())
            holders = found if i == 0 else holders & found
            if not holders:
                break
            for instance in holders:
                depth[instance] = i + 1
        return depth

    def _remember(self, instance: int, ids: list[bytes]) -> None:
        known = self._known.setdefault(instance, OrderedDict())
        for key in reversed(ids):  # the start of a prefix is the last to be forgotten
            known[key] = None
            known.move_to_end(key)
            self._holders.setdefault(key, set()).add(instance)
        while len(known) > self.remembered:
            key, _ = known.popitem(last=False)
            holders = self._holders[key]
            holders.discard(instance)
            if not holders:
                del self._holders[key]
