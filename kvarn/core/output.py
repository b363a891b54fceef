"""What the engine hands back to whoever asked: `Output`, one per sequence and step."""

from dataclasses import dataclass, field
from typing import Literal

from kvarn.core.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Timings:
    """Where a request's time went, on the engine's clock. [seconds]"""

    queue: float = 0.0  #: arrival to first batch
    first_token: float = 0.0  #: arrival to first token
    total: float = 0.0  #: arrival to this output


@dataclass(slots=True)
class Output:
    """New tokens and text of one sequence; the last one of a sequence has `finish` set."""

    request_id: str
    index: int  #: which of the request's n sequences
    tokens: list[int] = field(default_factory=list)  #: new since the output before
    text: str = ""  #: new since the output before; "" while a character is incomplete
    finish: FinishReason | None = None
    stop: int | str | None = None  #: the stop token id or stop string that ended it
    logprobs: list[TokenLogprobs] | None = None  #: one for each new token
    prompt_logprobs: list[TokenLogprobs | None] | None = None  #: in the first output; [0] is None
    embedding: list[float] | None = None
    error: str | None = None  #: with finish == "error": the message for the client
    n_prompt: int = 0  #: tokens of the prompt
    n_output: int = 0  #: tokens generated so far by this sequence
    n_cached: int = 0  #: prompt tokens taken from the prefix cache
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class TrainerStats:
    """Training of the drafter on live traffic; counters grow for ever, gauges are of now."""

    failed: str = ""  #: why it has ended; "": it goes on
    version: int = 0  #: of the drafter's weights, 0: those it began with
    published: int = 0  #: versions that were put in force
    rolled_back: int = 0  #: of those, taken back
    acceptance_before: float = 0.0  #: of judged tokens, under the version before
    acceptance: float = 0.0  #: of judged tokens, under this version, lately
    lessons: int = 0  #: ended sequences that wait to be learnt from
    dropped: int = 0  #: of those, lost for want of room
    loss: float = 0.0  #: of the last update [nats]
    seconds: float = 0.0  #: taken: of its thread's processor time, or of the steps' time [s]


@dataclass(slots=True)
class EngineStats:
    """A snapshot for metrics and `/server_info`; counters grow for ever, gauges are of now."""

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0  #: pages of the first group
    kv_pages_used: int = 0  #: held by sequences (cached but idle pages do not count)
    kv_pages_cached: int = 0  #: idle pages kept for prefix hits
    preemptions: int = 0
    prompt_tokens: int = 0  #: of admitted requests
    cached_tokens: int = 0  #: of those, found in the prefix cache
    output_tokens: int = 0
    drafted_tokens: int = 0  #: proposed by speculation and verified
    accepted_tokens: int = 0  #: of those, accepted
    verify_steps: int = 0  #: steps with drafts in them
    replayed_verify_steps: int = 0  #: of those, replayed whole from captured graphs
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)  #: by finish reason
    trainer: TrainerStats | None = None  #: None: the drafter does not learn
