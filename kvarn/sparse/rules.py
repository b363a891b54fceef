"""What is in force for a request: "part" or "part:field=value,...", from the engine or the request.

The same rules decide in the engine, in a replay and in the simulator; only the engine also asks the
parts to score anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, cast

from kvarn.core.errors import ConfigError, RequestError, nearest
from kvarn.core.keep import ENDLESS, Filter, Keep, Select
from kvarn.core.model import GroupSpec, shares_of
from kvarn.core.part import find
from kvarn.core.request import Request
from kvarn.sparse.part import OneShot, PromptFilter, Selector, Sparsity

NONE = "none"


@cache
def parse(text: str) -> Sparsity | None:
    """The part that `text` describes; None for "none"; what cannot be is a `ConfigError`."""
    name, _, rest = text.partition(":")
    if name == NONE and not rest:
        return None
    part: Any = find("sparsity", name)
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(part)}
    given: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in kinds:
            raise ConfigError(f"sparsity {name!r} has no option {key!r}{nearest(key, kinds)}")
        try:
            given[key] = _switch(value) if kinds[key] is bool else kinds[key](value)
        except (ValueError, KeyError):
            raise ConfigError(
                f"sparsity {name!r}: {key} must be of type {kinds[key].__name__}, not {value!r}"
            ) from None
    return cast(Sparsity, part(**given))


def _switch(text: str) -> bool:
    return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[
        text.lower()
    ]


def split(groups: list[GroupSpec], text: str) -> list[GroupSpec]:
    """The table groups of an engine whose part is `text`, of those of its model."""
    part = parse(text)
    return groups if part is None else part.split(groups)


@dataclass(slots=True)
class Rules:
    """The engine's own part and what requests may ask for instead."""

    groups: Sequence[GroupSpec]
    page_size: int
    default: str = NONE
    drafts: int = 0  #: longest draft; 0: the engine does not speculate [tokens]
    deterministic: bool = False  #: whether it promises the same bits in any batch
    max_len: int = 0  #: longest sequence that is asked for; 0: the model's [tokens]
    model_len: int = ENDLESS  #: positions that the model knows

    def __post_init__(self) -> None:
        self._checked(self.default)
        if self.endless and not self._streams(self.default):
            raise ConfigError(
                f"max_len={self.max_len} is beyond the model's own limit of {self.model_len} "
                f"tokens; only streams whose positions count in the cache may go on for ever: "
                f"sparsity=streamingllm with a budget of at most {self.model_len}"
            )

    @property
    def endless(self) -> bool:
        """Whether sequences may be longer than what the model knows."""
        return self.max_len > self.model_len

    def _streams(self, text: str) -> bool:
        part = parse(text)
        keeps = [] if part is None else [part.keep(group, self.n_layers) for group in self.groups]
        return bool(keeps) and all(
            keep is not None and keep.turns and keep.budget <= self.model_len for keep in keeps
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(shares_of(self.groups))

    @property
    def default_selects(self) -> bool:
        """Whether rows choose what they see where the request does not ask otherwise."""
        part = parse(self.default)
        return part is not None and part.rule(self.page_size, self.n_layers) is not None

    def part(self, request: Request) -> Sparsity | None:
        """What is in force for `request`."""
        return parse(self.default if request.sparsity is None else request.sparsity)

    @property
    def lists(self) -> Selector | None:
        """The part that says how many pages of a choice are remembered, if any are."""
        part = parse(self.default)
        return part if isinstance(part, Selector) and part.reuse > 1 else None

    def evicts(self, request: Request) -> OneShot | None:
        """The part that says what stays of its KV, of that of what goes on of its prompt."""
        part = self.part(request)
        part = part.after() if isinstance(part, PromptFilter) else part
        return part if isinstance(part, OneShot) else None

    def keeps(self, request: Request) -> tuple[Keep, ...]:
        """What stays of its KV, once a part of its prompt has gone on, by group; (): all of it."""
        part = self.part(request)
        if part is None:
            return ()
        found = [part.keep(group, self.n_layers) for group in self.groups]
        return tuple(keep for keep in found if keep is not None)

    def selects(self, request: Request) -> Select | None:
        """What its rows see of its KV; None: all that stays."""
        part = self.part(request)
        return None if part is None else part.rule(self.page_size, self.n_layers)

    def filters(self, request: Request) -> Filter | None:
        """What says which tokens of its prompt go on; None: they all do."""
        part = self.part(request)
        rule = None if part is None else part.filter(self.n_layers)
        return rule if rule is not None and len(request.prompt) > rule.budget else None

    def check(self, request: Request) -> None:
        """Refuse a request that asks for what this engine cannot do."""
        if request.sparsity is not None:
            try:
                self._checked(request.sparsity)
            except ConfigError as error:
                raise RequestError(str(error), param="sparsity", code="invalid_value") from None
        if self.endless:
            self._goes_on(request)
        if request.sampling.prompt_logprobs is not None and self.filters(request) is not None:
            raise RequestError(
                "prompt_logprobs cannot be had of a prompt of which only a part is computed by "
                "all layers; leave them out, or ask with sparsity=none",
                param="prompt_logprobs",
                code="invalid_value",
            )

    def _goes_on(self, request: Request) -> None:
        """Refuse what is no stream, or begins with more than the model can see at once."""
        if not self._streams(request.sparsity or self.default):
            raise RequestError(
                f"this engine's max_len={self.max_len} is beyond the model's own limit of "
                f"{self.model_len} tokens, so it serves nothing but streams: ask with "
                f"sparsity=streamingllm, or leave it out",
                param="sparsity",
                code="invalid_value",
            )
        n, streamed = len(request.prompt), self.keeps(request)[0].streamed
        if n > self.model_len and not streamed:
            raise RequestError(
                f"the prompt has {n} tokens, and the model sees at most {self.model_len} at once; "
                f"sparsity=streamingllm:streamed=true reads it through the window",
                param="prompt",
                code="context_length_exceeded",
            )

    def _checked(self, text: str) -> None:
        part, own = parse(text), parse(self.default)
        if text != self.default and own is not None and own.fixed:
            raise ConfigError(
                f"sparsity {text!r} cannot be had of an engine whose table groups are those of "
                f"sparsity={self.default}: leave it out, or start an engine without that"
            )
        if part is None:
            return
        if part.fixed and text != self.default:
            raise ConfigError(
                f"sparsity {part.name!r} needs table groups of its own, which this engine has not: "
                f"start it with sparsity={text}"
            )
        part.check(self.page_size, len(self.groups))
        if any(part.keep(group, self.n_layers) is not None for group in self.groups):
            self._can_evict(part)
        if part.rule(self.page_size, self.n_layers) is not None:
            self._can_select(part)
        rule = part.filter(self.n_layers)
        if rule is not None:
            self._can_filter(part, rule)
        if self.deterministic:
            raise ConfigError(
                f"sparsity {part.name!r} cannot run with deterministic: a step in which a prompt "
                f"is watched or filtered, or a row chooses what it sees, computes its layers in "
                f"another way; leave one of them out"
            )

    def _can_evict(self, part: Sparsity) -> None:
        if any(group.window is not None for group in self.groups) and not part.fixed:
            raise ConfigError(
                f"sparsity {part.name!r} cannot serve a model with sliding-window layers, "
                f"which drop positions by a rule of their own; sparsity=none does"
            )
        if self.drafts:
            raise ConfigError(
                f"sparsity {part.name!r} cannot run with speculation: a rejected draft has "
                f"already taken the places of older positions; use speculate=none"
            )

    def _can_filter(self, part: Sparsity, rule: Filter) -> None:
        layer = rule.layers - 1
        whole = [at for group in self.groups if group.window is None for at in group.layers]
        if layer not in whole:
            near = f"layer={min(whole, key=lambda at: abs(at - layer))}" if whole else "none"
            raise ConfigError(
                f"sparsity {part.name!r} cannot choose by layer={layer}, whose sliding window "
                f"has dropped most of the prompt; what would work: {near}"
            )

    def _can_select(self, part: Sparsity) -> None:
        if all(group.window is not None for group in self.groups):
            raise ConfigError(
                f"sparsity {part.name!r} has nothing to choose from in a model whose layers all "
                f"have sliding windows; use sparsity=none"
            )
        if not any(group.sketched for group in self.groups):
            raise ConfigError(
                f"sparsity {part.name!r} needs bounds beside the pages, which this engine has no "
                f"memory for: start it with sparsity={part.name}; requests may then say none"
            )
        own = self.lists
        if own is None and isinstance(part, Selector) and part.reuse > 1:
            raise ConfigError(
                f"sparsity {part.name!r}: reuse={part.reuse} needs memory for what rows have "
                f"chosen: start the engine with a reuse of its own; reuse=1 needs none"
            )
        if own is not None and isinstance(part, Selector) and not _within(part, own):
            raise ConfigError(
                f"sparsity {part.name!r}: budget={part.budget} and reuse={part.reuse} do not fit "
                f"into this engine's memory of choices, made for {own.name}:budget={own.budget},"
                f"reuse={own.reuse}; no larger budget fits, and a reuse of 1 or no smaller one"
            )


def _within(part: Selector, own: Selector) -> bool:
    """Whether what `part` chooses fits where an engine remembers what `own` would."""
    return part.budget <= own.budget and (part.reuse == 1 or part.reuse >= own.reuse)
