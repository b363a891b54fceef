"""What the user asked: `SamplingParams` and `Request`. Immutable once made."""

from dataclasses import dataclass, field
from typing import Literal

PoolingKind = Literal["mean", "last"]
LogprobsMode = Literal["raw", "processed"]


@dataclass(slots=True, frozen=True)
class Grammar:
    """A constraint on the output text: exactly one kind, with its source."""

    kind: Literal["json", "json_schema", "regex", "ebnf"]
    source: str = ""  #: schema as JSON text, regular expression, or grammar (empty for kind "json")


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends.

    The defaults sample from the model's own distribution; `temperature=0` is greedy.
    Values are checked by `kvarn.core.validate`, which names the offending field.
    """

    n: int = 1  #: sequences generated for the prompt
    max_tokens: int | None = 16  #: most tokens generated; None: up to the context limit [tokens]
    min_tokens: int = 0  #: no stop token or stop string before this many [tokens]
    temperature: float = 1.0  #: 0 is greedy
    top_k: int = 0  #: keep the k most likely; 0 or -1: all
    top_p: float = 1.0  #: keep the smallest set with this probability mass
    min_p: float = 0.0  #: keep tokens at least this share of the most likely one's probability
    repetition_penalty: float = 1.0  #: over prompt and output (CTRL); 1 is off
    frequency_penalty: float = 0.0  #: times the count in the output
    presence_penalty: float = 0.0  #: once for each token present in the output
    logit_bias: dict[int, float] = field(default_factory=dict)  #: added to the logits, by token id
    bad_words: tuple[str, ...] = ()  #: texts that must not be generated
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  #: the same as token ids (filled by the engine)
    allowed_token_ids: tuple[int, ...] | None = None  #: choose only among these
    seed: int | None = None  #: same seed, same tokens, whatever else is in the batch
    stop: tuple[str, ...] = ()  #: texts that end the sequence
    stop_token_ids: tuple[int, ...] = ()  #: tokens that end the sequence, beside the model's own
    include_stop: bool = False  #: keep the matched stop string in the text
    ignore_eos: bool = False  #: go on past the model's end-of-sequence tokens
    logprobs: int | None = None  #: alternatives reported beside each token's logprob; None: off
    prompt_logprobs: int | None = None  #: the same for the prompt's tokens
    logprobs_mode: LogprobsMode = "raw"  #: of the model's logits, or after all processing
    grammar: Grammar | None = None  #: structured output
    skip_special_tokens: bool = True  #: leave special tokens out of the text


@dataclass(slots=True, frozen=True)
class SLO:
    """What the user was promised; policies may use it, `bench` judges by it. [seconds]"""

    ttft: float | None = None  #: time to first token
    tpot: float | None = None  #: mean time per output token after the first


@dataclass(slots=True, frozen=True)
class Request:
    """One request as token ids; text and chat templates are dealt with before."""

    id: str
    prompt: list[int]  #: token ids; never changed after construction
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  #: lower runs first
    arrival: float = 0.0  #: when it came in [s, the driver's clock]
    session: str | None = None  #: conversation or tenant, for policies
    cache_salt: str = ""  #: requests share cached prefixes only with equal salts
    slo: SLO | None = None
    pooling: PoolingKind | None = None  #: an embedding request: no token is generated
    eos_ids: tuple[int, ...] = ()  #: the model's end-of-sequence tokens (filled by the engine)
    sparsity: str | None = None  #: what stays of its KV, "part:field=value"; None: as the engine
