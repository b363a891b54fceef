"""Sections of docs/results.md on the KV that is kept."""

from typing import Any

from cells import Lines, table


def kept(result: dict[str, Any]) -> Lines:
    """Policies at equal stored bytes."""
    said = result["workload"]
    rows = [
        [
            row["sparsity"], row["stored_bytes"] / 2**20, row["kl"], row["perplexity"],
            row["needle"], row["recall"], row["second"],
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} in fp32; KL "
        f"divergence from the full cache [nats] and perplexity of the {said['given']} tokens after "
        f"{said['prompt']} of a book ({said['texts']} places), MiB stored there; share of "
        f"{said['questions']} questions of each kind answered rightly: a number in a sentence, one "
        "of 60 pairs, and a second question on what the first one left. With `duoattention` a "
        "share of the heads keeps all and the others a window, as many bytes together on the text "
        "(fewer on the questions, whose documents are shorter); by=random takes heads by lot.",
        "",
        *table(["what stays", "MiB", "KL", "perplexity", "needle", "recall", "second"], rows),
    ]


def streaming(result: dict[str, Any]) -> Lines:
    """A stream far longer than the cache."""
    said = result["workload"]
    best = result["results"][0]["perplexity"]
    rows = [
        [row["setting"], row["perplexity"], row["perplexity"] / best] for row in result["results"]
    ]
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} in fp32, a text of "
        f"{said['tokens']} tokens through a cache of {said['budget']}; perplexity beyond the first "
        f"cache-full, and over that of a window computed anew for every {said['anew']} tokens.",
        "",
        *table(["cache", "perplexity", "ratio"], rows),
    ]


def sparse_decode(result: dict[str, Any]) -> Lines:
    """Long prompts, dense and kept in part."""
    said = result["workload"]
    rows = [
        [
            row["sparsity"], row["sequences"], row["pages_held"] / row["sequences"],
            row["tokens_per_s"], 1000 * row["step_s"], row["first_token_s"],
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"{result['config']['model']}, random weights, prompts of {said['prompt']} tokens, as many "
        f"sequences as the memory holds (at most 48): KV {result['kv_bytes_ratio']:.1f} times "
        f"smaller, decode rate {result['decode_ratio']:.2f} times, time to the first token of one "
        f"prompt {result['prefill_ratio']:.3f} times that of the full cache.",
        "",
        *table(
            ["what stays", "sequences", "pages each", "tokens/s", "step [ms]", "first token [s]"],
            rows,
        ),
    ]


def selection(result: dict[str, Any]) -> Lines:
    """Rows that choose what they read."""
    said = result["workload"]
    rows = [
        [
            row["sparsity"], round(row["read"]), row["kl"], row["kl_median"], row["perplexity"],
            row.get("needle", ""), row.get("second", ""),
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} in fp32, "
        f"{said['given']} tokens after {said['prompt']} of a book ({said['texts']} places): "
        "positions read a step (bounds and dense layers included), KL divergence from the full "
        "cache, mean and median [nats], perplexity; questions as above, where they were asked. "
        "What is kept for good stands there twice: with the budget, and with what is read.",
        "",
        *table(["what is read", "positions", "KL", "median", "perplexity", "needle", "second"],
               rows),
    ]  # fmt: skip


def select_decode(result: dict[str, Any]) -> Lines:
    """Decode steps of long prompts, dense and chosen from."""
    said = result["workload"]
    rows = [
        [
            row["batch"], 1000 * row["dense_step_s"], 1000 * row["step_s"], row["ratio"],
            *([1000 * row["reuse_step_s"], row["reuse_ratio"]] if "reuse" in row else []),
        ]
        for row in result["results"]
    ]  # fmt: skip
    reuse = result["results"][0].get("reuse")
    more = [f"with reuse={reuse} [ms]", "ratio so"] if reuse else []
    return [
        f"{result['config']['model']}, random weights, prompts of {said['prompt']} tokens, "
        f"`quest:budget={said['budget']}`, KV in {said['kv_dtype']}; all are replayed from "
        "captured graphs, in turns.",
        "",
        *table(["sequences", "dense step [ms]", "step [ms]", "ratio", *more], rows),
    ]


def select_pages(result: dict[str, Any]) -> Lines:
    """One layer's attention: its parts, and all where a choice serves more rows than one."""
    shared = "reuse_us" in result["results"][0]
    rows = [
        [
            row["batch"], row["length"], row["budget"], row["dense_us"], row["bounds_us"],
            row["pick_us"] - row["bounds_us"], row["whole_us"] - row["pick_us"], row["whole_us"],
            row["times_faster"], row["ideal"],
            *([row["reuse_us"], row["times_faster_reuse"], row["ideal_reuse"]] if shared else []),
        ]
        for row in result["results"]
    ]  # fmt: skip
    more = ["of a choice for four rows", "times faster so", "by bytes so"] if shared else []
    return [
        "Attention of one layer of an 8B model in bf16 [us]: over all pages; the bounds of all, "
        "the pick of the best and attention over these; and the ratio, beside that of the bytes.",
        "",
        *table(
            ["sequences", "positions", "budget", "dense", "bounds", "pick", "attention", "all",
             "times faster", "by bytes", *more],
            rows,
        ),
    ]  # fmt: skip


def recalled(result: dict[str, Any]) -> Lines:
    """The recall model's answers."""
    said = result["workload"]
    again = "again" in result["results"][0]
    rows = [
        [
            row["tokens"], _setting(row, said["share"]), row["first"],
            *([row["again"]] if again else []), row["late"],
        ]
        for row in result["results"]
    ]  # fmt: skip
    more = (
        "The same one is asked again after the first time was passed over, and answered from what "
        "was chosen for it. "
        if again
        else ""
    )
    return [
        f"`kvarn reproduce {result['experiment']}`: the model of `benchmarks/train_recall.py`, one "
        "pair in 16 tokens; share of questions answered rightly where an eighth of the context is "
        "kept, or read. A first question is the prompt's last token, answered by its last dense "
        f"step unless the prompt was filtered; a late one comes after that answer. {more}"
        "Contexts and questions of each kind about one, by length: "
        + ", ".join(f"{n}: {a} x {b}" for n, (a, b) in said["sizes"].items())
        + ".",
        "",
        *table(
            ["tokens", "what stays or is read", "first", *(["again"] if again else []), "late"],
            rows,
        ),
    ]


def _setting(row: dict[str, Any], share: int) -> str:
    """What stays or is read, where it differs from the others."""
    part = "" if row.get("share", share) == share else f", 1/{row['share']} of it"
    pages = f", pages of {row['page_size']}" if "page_size" in row else ""
    return f"{row['sparsity']}{part}{pages}"


def filtered(result: dict[str, Any]) -> Lines:
    """Prompts of which a part goes on: the part beside its rivals, and the sweep of layers."""
    said = result["workload"]
    names = ("full", "gemfilter", "snapkv", "random", "last", "covered", "lacking")
    rows = [[row["set"], *(row[name] for name in names)] for row in result["results"]]
    columns = [name for name in result["sweep"][0] if name != "layer"]
    sweep = [[row["layer"], *(row[name] for name in columns)] for row in result["sweep"]]
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} in fp32; share of "
        f"{said['questions']} questions of each kind answered rightly with 1/{said['share']} of "
        "the prompt: what the part lets go on, the KV that `snapkv` keeps, tokens by lot and the "
        "last ones (the first token and the last 32 always among them). Then the share in which "
        "all that the answer needs went on, and how many of the first token and the last 32 the "
        f"scores lacked. The part chooses by layer {said['default_layer']}, its default here.",
        "",
        *table(
            ["questions", "full", "gemfilter", "snapkv", "by lot", "last", "went on", "lacking"],
            rows,
        ),
        "",
        "What each layer would choose: the share of questions whose facts would go on, and of "
        "those that are answered rightly from what would.",
        "",
        *table(["layer", *columns], sweep),
    ]


def prefill(result: dict[str, Any]) -> Lines:
    """Long prompts on a GPU: whole, whole and evicted, filtered."""
    said = result["workload"]
    rows = [
        [
            row["prompt"], one["sparsity"], one["first_token_s"], one["kv_peak_bytes"] / 2**20,
            one["kv_end_bytes"] / 2**20, one["step_peak_bytes"] / 2**20,
        ]
        for row in result["results"]
        for one in row["settings"]
    ]  # fmt: skip
    ratios = "; ".join(
        f"{row['prompt']} tokens: first token {row['speedup']:.2f} times sooner than with the full "
        f"prompt (by layers and tokens alone {row['ideal']:.2f}), peak KV "
        f"{row['kv_peak_over_snapkv']:.2f} of snapkv's"
        for row in result["results"]
    )
    pools = result["pool_bytes"]
    return [
        f"{result['config']['model']}, random weights, one request at a time, {said['budget']} "
        f"tokens go on, chosen by layer {said['layer']} of {said['layers']}. {ratios}. Pools made "
        f"for one request of the longest prompt: {pools['none'] / 2**20:.0f} MiB for the whole KV, "
        f"{pools['gemfilter'] / 2**20:.0f} MiB with table groups.",
        "",
        *table(
            ["prompt", "setting", "first token [s]", "KV peak [MiB]", "KV at the end", "steps"],
            rows,
        ),
    ]


def streams(result: dict[str, Any]) -> Lines:
    """Steps of streams by their length, and windows that are computed anew."""
    lengths = list(result["results"][0]["step_s"])
    rows = [
        [
            row["budget"], row["batch"], *(1000 * row["step_s"][length] for length in lengths),
            row["spread"], 1000 * row["anew_s"], row["times_faster"],
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"{result['config']['model']}, random weights, `streamingllm` with "
        f"{result['workload']['sinks']} sinks: a step [ms] after so many tokens, whose passing was "
        "told to the engine and not computed; how much the slowest takes more; a window computed "
        "anew for one token.",
        "",
        *table(
            ["cache", "streams", *(f"after {length}" for length in lengths), "slowest", "anew [ms]",
             "times faster"],
            rows,
        ),
    ]  # fmt: skip
