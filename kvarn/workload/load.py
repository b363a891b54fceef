"""`open_trace`: public trace formats in one normal form, recognised by their columns.

Units differ (ms, s, dates), so do blocks (512 or 16 positions) and what a row may leave out; every
reader says so. A malformed row is an error that names file, line and reason, or is counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError, nearest
from kvarn.workload.files import BadRow, count, number, rows
from kvarn.workload.trace import Trace, TraceRequest

Row = dict[str, Any]

#: tokens of a word, where a file holds text and no tokenizer is at hand
TOKENS_PER_WORD = 1.3
#: dates become seconds after it: near enough for floats to keep their 100 ns
EPOCH = datetime(2023, 1, 1, tzinfo=UTC)


@dataclass(slots=True, frozen=True)
class Format:
    """How one kind of file is told and read."""

    columns: frozenset[str]  #: that it must have
    read: Callable[[Row, int], TraceRequest | None]  #: row and its number; None: not a request
    block_size: int = 512  #: of its blocks, unless the lengths say otherwise [tokens]


def _mooncake(row: Row, i: int) -> TraceRequest:
    """Mooncake FAST'25 and files like it: ms, tokens, chained block ids."""
    n_in = count(row, "input_length", 1)
    return TraceRequest(
        str(i), number(row, "timestamp") / 1000, n_in, count(row, "output_length"), _blocks(row)
    )


def _blocks(row: Row) -> tuple[int, ...]:
    ids = row.get("hash_ids") or []
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise BadRow("hash_ids must be a list of whole numbers")
    return tuple(ids)


def _bailian(row: Row, i: int) -> TraceRequest:
    """Qwen-Bailian: seconds, conversations, 16-token blocks."""
    parent, name = row.get("parent_chat_id"), str(row.get("chat_id", i))
    root = parent in (-1, "-1", None)
    return TraceRequest(
        id=name,
        at=number(row, "timestamp"),
        n_in=count(row, "input_length", 1),
        n_out=count(row, "output_length"),
        blocks=_blocks(row),
        turn=max(0, count(row, "turn") - 1) if "turn" in row else 0,
        session=name if root else None,
        parent=None if root else str(parent),
        kind=str(row.get("type", "")),
    )


def _azure(row: Row, i: int) -> TraceRequest:
    """Azure 2023 and 2024: UTC dates with up to 100 ns, no contents."""
    try:
        text = row["TIMESTAMP"]
        whole, _, part = text.replace("Z", "").removesuffix("+00:00").partition(".")
        when = datetime.fromisoformat(whole).replace(tzinfo=UTC) - EPOCH
        at = when.total_seconds() + float(f"0.{part or 0}")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRow(f"TIMESTAMP is {row.get('TIMESTAMP')!r}, not a date") from None
    n_in, n_out = count(row, "ContextTokens", 1), count(row, "GeneratedTokens")
    return TraceRequest(str(i), at, n_in, n_out)


def _burstgpt(row: Row, i: int) -> TraceRequest | None:
    """BurstGPT: seconds; a response of 0 tokens is a failure and no request that was served."""
    n_out = count(row, "Response tokens")
    if n_out == 0:
        return None
    session = row.get("Session ID")
    return TraceRequest(
        str(i), number(row, "Timestamp"), count(row, "Request tokens", 1), n_out,
        session=str(session) if session else None, kind=str(row.get("Log Type", "")),
    )  # fmt: skip


def _sharegpt(row: Row, i: int) -> TraceRequest | None:
    """ShareGPT-like conversations: the first exchange; lengths by words, no times (all at 0)."""
    said = row.get("conversations") or row.get("messages")
    if not isinstance(said, list):
        raise BadRow("conversations must be a list")
    texts = [one.get("value", one.get("content")) for one in said if isinstance(one, dict)][:2]
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        return None  # nothing was asked, or nothing answered
    n_in, n_out = (max(1, round(len(str(text).split()) * TOKENS_PER_WORD)) for text in texts)
    return TraceRequest(str(i), 0.0, n_in, n_out)


def _lengths(row: Row, i: int) -> TraceRequest:
    """Pairs of lengths without times (Vidur's processed traces): all at 0."""
    n_in, n_out = count(row, "num_prefill_tokens", 1), count(row, "num_decode_tokens")
    return TraceRequest(str(i), 0.0, n_in, n_out)


#: tried in this order: the first whose columns are all there reads the file
FORMATS: dict[str, Format] = {
    "bailian": Format(
        frozenset({"chat_id", "parent_chat_id", "timestamp", "input_length", "output_length"}),
        _bailian, 16,
    ),
    "mooncake": Format(frozenset({"timestamp", "input_length", "output_length"}), _mooncake),
    "azure": Format(frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    "burstgpt": Format(frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt),
    "lengths": Format(frozenset({"num_prefill_tokens", "num_decode_tokens"}), _lengths),
    "sharegpt": Format(frozenset({"conversations"}), _sharegpt),
    "messages": Format(frozenset({"messages"}), _sharegpt),
}  # fmt: skip


def open_trace(path: str, kind: str | None = None, skip_bad: bool = False) -> Trace:
    """Read a trace; times start at 0, requests are in order of arrival (stable).

    `kind`: a name of `FORMATS`, or None to tell by the columns. Malformed rows raise `ConfigError`;
    with `skip_bad` they are left out and counted in `Trace.skipped`.
    """
    if kind is not None and kind not in FORMATS:
        raise ConfigError(f"no trace format is called {kind!r}{nearest(kind, FORMATS)}")
    form = FORMATS[kind] if kind else None
    found: list[tuple[int, TraceRequest]] = []  # with their lines
    ids: set[str] = set()
    skipped = failed = 0
    for line, row in rows(path):
        try:
            if isinstance(row, BadRow):
                raise row
            form = form or _tell(row, path)
            request = form.read(row, len(found))
            if request is not None and request.id in ids:
                raise BadRow(f"{request.id} names two requests")
        except BadRow as why:
            _refuse(path, line, why, skip_bad)
            skipped += 1
            continue
        if request is None:
            failed += 1
        else:
            ids.add(request.id)
            found.append((line, request))
    if form is None or not found:
        raise ConfigError(f"{path} holds no request ({skipped} malformed rows, {failed} empty)")
    size = _block_size([request for _, request in found], form)
    kept: list[TraceRequest] = []
    for line, request in found:
        if _fits(request, size):
            kept.append(request)
            continue
        n = len(request.blocks)
        _refuse(path, line, f"{n} hash_ids of {size} for {request.n_in} tokens", skip_bad)
        skipped += 1
    name = Path(path).name.removesuffix(".gz").rpartition(".")[0]
    chain = (f"left_out({failed} rows without an answer)",) if failed else ()
    return Trace(name, _linked(_from_zero(kept)), size, chain, skipped)


def _refuse(path: str, line: int, why: BadRow | str, skip_bad: bool) -> None:
    if not skip_bad:
        raise ConfigError(
            f"{path}, line {line}: {why}; --skip-bad leaves such rows out and counts them"
        ) from None


def _from_zero(found: list[TraceRequest]) -> list[TraceRequest]:
    """In order of arrival (stable), the first at 0."""
    first = min(request.at for request in found)
    return sorted((replace(one, at=one.at - first) for one in found), key=lambda one: one.at)


def _linked(ordered: list[TraceRequest]) -> tuple[TraceRequest, ...]:
    """Parents that are in the trace, by name or else by session; turns and sessions to match."""
    known: dict[str, TraceRequest] = {}
    latest: dict[str, TraceRequest] = {}  # by session
    for one in ordered:
        parent = latest.get(one.session) if one.session else known.get(one.parent or "")
        if parent is not None:
            one = replace(one, session=parent.session, turn=parent.turn + 1, parent=parent.id)
        elif one.parent is not None:  # a conversation that began before the trace
            one = replace(one, session=one.id, parent=None)
        known[one.id] = one
        if one.session:
            latest[one.session] = one
    return tuple(known.values())


def _tell(row: Row, path: str) -> Format:
    for form in FORMATS.values():
        if form.columns <= row.keys():
            return form
    known = "; ".join(f"{name}: {', '.join(sorted(f.columns))}" for name, f in FORMATS.items())
    raise ConfigError(
        f"{path}: no known trace has the columns {sorted(map(str, row))}; known are {known}"
    )


def _block_size(found: list[TraceRequest], form: Format) -> int:
    """What a block stands for: the format's size, or the one that agrees with more prompts."""

    def agreeing(size: int) -> int:
        return sum(_fits(one, size) for one in found)

    return max((form.block_size, 16, 512), key=agreeing)


def _fits(request: TraceRequest, size: int) -> bool:
    """A prompt of n tokens has ceil(n / size) blocks, or floor where only whole ones are listed."""
    fitting = (request.n_in // size, -(-request.n_in // size))
    return not request.blocks or len(request.blocks) in fitting
