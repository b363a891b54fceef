"""Options of every benchmark, as data: the command line makes its flags from them."""

import math
from dataclasses import dataclass

from kvarn.core.config import option


@dataclass(slots=True)
class Workload:
    """What a data set is made from; two results with equal workloads may be compared."""

    dataset: str = option("random", "random, shared-prefix, multi-turn, sharegpt or trace")
    num_prompts: int = option(100, "requests; the turns of a conversation count one by one")
    input_len: int = option(128, "mean own length of a prompt", "tokens")
    output_len: int = option(128, "mean length of an answer; sharegpt: 0 is the file's", "tokens")
    range_ratio: float = option(0.0, "both lengths spread by this share of the mean, in [0, 1)")
    prefix_len: int = option(0, "shared by all prompts, or by those of a group", "tokens")
    prefixes: int = option(1, "shared-prefix: groups, each with its own prefix")
    turns: int = option(4, "multi-turn: requests of a conversation")
    dataset_path: str | None = option(
        None,
        "sharegpt: JSON list or lines with conversations, messages or prompt; trace: JSON lines "
        "with timestamp [ms], input_length, output_length, hash_ids (Mooncake) or CSV with "
        "TIMESTAMP, ContextTokens, GeneratedTokens (Azure); .gz as well",
    )
    speed: float = option(1.0, "trace: the trace's clock runs this many times faster")
    vocab: int = option(32000, "random token ids stay below this", "tokens")
    seed: int = option(0, "of prompts, lengths and arrival times")


@dataclass(slots=True)
class Load:
    """How a workload is sent, and how the answers are judged."""

    base_url: str = option("http://127.0.0.1:8000", "address of the server")
    backend: str = option("openai", "openai (completions), openai-chat or sglang (/generate)")
    model: str | None = option(None, "name the server knows it by; default: its first one")
    request_rate: float = option(math.inf, "mean rate; inf: all at once", "requests/s")
    burstiness: float = option(
        1.0, "shape of the gamma intervals: 1 is Poisson, below 1 burstier, inf a fixed interval"
    )
    max_concurrency: int | None = option(None, "most requests in flight")
    processes: int = option(2, "client processes; they share the requests and the concurrency")
    warmups: int = option(1, "requests sent before, not counted; they also prove the server is up")
    temperature: float = option(0.0, "of sampling; 0 is greedy")
    ignore_eos: bool = option(True, "generate to the full length")
    goodput: tuple[str, ...] = option((), "targets such as ttft:200 tpot:50 e2el:2000", "ms")
    percentiles: tuple[float, ...] = option((50.0, 90.0, 95.0, 99.0), "reported percentiles")
    timeout: float = option(600.0, "of one request", "s")
    api_key: str | None = option(None, "sent as a bearer token")
    header: tuple[str, ...] = option((), "further header fields, NAME=VALUE")
    label: str | None = option(None, "name of this run, kept in the result")
    detailed: bool = option(False, "keep one entry a request: times, texts, errors")


@dataclass(slots=True)
class Offline:
    """How the offline benchmark measures."""

    preset: tuple[str, ...] = option(
        (), "named workloads instead of a data set: W1, W8, W16, P16, prefill-512"
    )
    repeats: int = option(3, "runs of each workload; the median counts")
    ceiling: bool = option(False, "also measure this machine's memory bandwidth and GEMM rate")


@dataclass(slots=True)
class Latency:
    """What the latency benchmark runs."""

    batch_sizes: tuple[int, ...] = option((1, 2, 4, 8, 16), "requests given together")
    input_len: int = option(32, "of every prompt", "tokens")
    output_len: int = option(128, "of every answer", "tokens")
    warmups: int = option(1, "runs of each size that are not counted")
    iterations: int = option(5, "runs of each size that are")


@dataclass(slots=True)
class Perplexity:
    """What the quality benchmark scores, and against what."""

    text: str | None = option(None, "file to score; default: four chapters that come with kvarn")
    window: int = option(512, "longest context", "tokens")
    stride: int = option(256, "new tokens of a window; the others are its context", "tokens")
    form: tuple[str, ...] = option(
        (), "number formats to measure instead of --dtype and --quantization: bfloat16, int8, ..."
    )
    against: str = option("", "number format whose perplexity the others are divided by: float32")


@dataclass(slots=True)
class Startup:
    """What the start-up benchmark runs."""

    repeats: int = option(3, "fresh processes; medians count")
    timeout: float = option(600.0, "of one process", "s")


@dataclass(slots=True)
class Fleet:
    """What a simulated cluster is made of: equal instances of one model behind a router."""

    model: str = option("llama-3.1-8b", "a named shape, or a folder or file with config.json")
    device: str = option("H100", "of each rank: H100, H200, A100-80G, L40S, ... or CPU")
    instances: int = option(1, "engines behind the router")
    router: str = option("round_robin", "round_robin, least_loaded, prefix_aware")
    tp: int = option(1, "devices of an instance (tensor parallelism)")
    cost: str = option("roofline", "price of steps: roofline, table, fitted")
    round_context: int = option(
        0, "price decodes at contexts rounded to this, for huge runs; 0: exactly", "tokens"
    )
    table: str | None = option(None, "measurements for --cost table or fitted (docs/cost-model.md)")
    dtype: str = option("bfloat16", "of weights and activations")
    quantization: str = option("none", "of the weights: none, int8, int4, fp8")
    kv_dtype: str = option("auto", "of the KV cache: auto (as the activations), fp8")
    max_len: int = option(0, "longest sequence; 0: the model's own limit", "tokens")
    max_seqs: int = option(256, "sequences that an instance runs at once")
    budget: int = option(8192, "positions computed in one step", "tokens")
    max_queue: int = option(1 << 30, "requests that may wait at an instance before refusal")
    page_size: int = option(0, "positions of a page; 0: the trace's blocks, else 16", "tokens")
    pages: int = option(0, "KV pages, as an engine measured them; 0: by formula")
    scheduler: str = option("continuous", "part that forms the batch of each step")
    prefix: str = option("hash", "prefix index: hash, radix, none")
    sparsity: str = option("none", "what stays of the KV: none, or a part, as the engine's option")
    evict: str = option("lru", "which cached prefix goes first: lru, lfu")
    overlap: str = option(
        "auto", "plan the next step while one runs: on, off; auto: as the engine, on but for CPUs"
    )
    speculate: str = option(
        "none", "who drafts: none; draft: a drafting model; synthetic: somebody, at no cost"
    )
    draft_length: str = option("survival", "how many are drafted for whom: a part of `kvarn parts`")
    draft_tokens: int = option(8, "longest draft", "tokens")
    acceptance: str = option(
        "",
        "share of drafted tokens that stand, given those before: 0.7, or 0.7,0.6 by place in the "
        "draft (the last for all further ones); measured: by subject, as SmolLM2's drafter",
    )
    draft_seed: int = option(0, "of which drafted tokens stand")
    draft_model: str = option("", "speculate=draft: a named shape, or a folder or file, priced")
    draft_cost: float = option(
        0.0, "speculate=draft, without a draft_model: its pass as a share of the model's own"
    )
    subjects: str = option(
        "", "acceptance=measured: what the traffic is about, in turn; default: talk,code,spanish"
    )
    subject_seconds: float = option(600.0, "that the traffic stays with one of them", "s")
    train_drafter: str = option(
        "off", "acceptance=measured: the drafter of each instance learns: off, on, idle, inline"
    )
    train_interval: int = option(8, "train_drafter: requests that end before the next update")
    train_seconds: float = option(0.0, "train_drafter: of an update; 0: as on two cores", "s")
    train_slowdown: float = option(
        0.0, "train_drafter=on: of steps beside an update; 0: as measured on an H200"
    )


@dataclass(slots=True)
class Traffic:
    """What a simulated cluster is asked, and how it is judged."""

    trace: str | None = option(None, "a recorded trace (docs/workloads.md) instead of a data set")
    skip_bad: bool = option(False, "leave out malformed rows of the trace, and count them")
    limit: int = option(0, "only the first requests of the trace; 0: all")
    closed_loop: bool = option(False, "a turn waits for the answer before it and the time to think")
    request_rate: float = option(
        math.inf, "mean rate of a data set; inf: all at once", "requests/s"
    )
    burstiness: float = option(
        1.0, "shape of the gamma intervals: 1 is Poisson, below 1 burstier, inf a fixed interval"
    )
    goodput: tuple[str, ...] = option((), "targets such as ttft:200 tpot:50 e2el:2000", "ms")
    percentiles: tuple[float, ...] = option((50.0, 90.0, 95.0, 99.0), "reported percentiles")
    label: str | None = option(None, "name of this run, kept in the result")
    detailed: bool = option(False, "keep one entry a request: times, and why it went where it went")
    perfetto: str | None = option(
        None, "write every instance's steps to this file (ui.perfetto.dev)"
    )
    plots: str | None = option(None, "draw latencies and KV use into this folder, as SVG files")
    jobs: int = option(1, "processes that share the instances; above 1: with router=round_robin")


@dataclass(slots=True)
class Search:
    """What a capacity search looks for, and how closely."""

    find: str | None = option(
        None, "rate: the highest at which the --goodput targets are met; fleet: the cheapest for it"
    )
    attain: float = option(0.99, "share of all requests that must meet every target, in (0, 1]")
    tolerance: float = option(0.02, "rate: relative distance of the rates the answer lies between")
    try_device: tuple[str, ...] = option((), "fleet: devices to choose from, such as H100,L40S")
    try_tp: tuple[int, ...] = option((), "fleet: values of tp to choose from, such as 1,2")
    max_instances: int = option(64, "fleet: most instances that are tried")


@dataclass(slots=True)
class Paid:
    """What devices cost."""

    price: tuple[str, ...] = option(
        (), "what one device costs for an hour, such as h100=2.5,t4=0.35: the fleet's cost"
    )
