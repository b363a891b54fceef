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
        "of 60 pairs, and a second question on what the first one left.",
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
        [row["batch"], 1000 * row["dense_step_s"], 1000 * row["step_s"], row["ratio"]]
        for row in result["results"]
    ]
    return [
        f"{result['config']['model']}, random weights, prompts of {said['prompt']} tokens, "
        f"`quest:budget={said['budget']}`, KV in {said['kv_dtype']}; both are replayed from "
        "captured graphs, in turns.",
        "",
        *table(["sequences", "dense step [ms]", "step [ms]", "ratio"], rows),
    ]


def select_pages(result: dict[str, Any]) -> Lines:
    """One layer's attention: its parts."""
    rows = [
        [
            row["batch"], row["length"], row["budget"], row["dense_us"], row["bounds_us"],
            row["pick_us"] - row["bounds_us"], row["whole_us"] - row["pick_us"], row["whole_us"],
            row["times_faster"], row["ideal"],
        ]
        for row in result["results"]
    ]  # fmt: skip
    return [
        "Attention of one layer of an 8B model in bf16 [us]: over all pages; the bounds of all, "
        "the pick of the best and attention over these; and the ratio, beside that of the bytes.",
        "",
        *table(
            ["sequences", "positions", "budget", "dense", "bounds", "pick", "attention", "all",
             "times faster", "by bytes"],
            rows,
        ),
    ]  # fmt: skip


def recalled(result: dict[str, Any]) -> Lines:
    """The recall model's answers."""
    said = result["workload"]
    rows = [
        [row["tokens"], row["sparsity"], row["first"], row["late"]] for row in result["results"]
    ]
    return [
        f"`kvarn reproduce {result['experiment']}`: the model of `benchmarks/train_recall.py`, one "
        "pair in 16 tokens; share of questions answered rightly where an eighth of the context is "
        "kept, or read. A first question is the prompt's last token; a late one comes after its "
        "answer. Contexts and questions of each kind about one, by length: "
        + ", ".join(f"{n}: {a} x {b}" for n, (a, b) in said["sizes"].items())
        + ".",
        "",
        *table(["tokens", "what stays or is read", "first", "late"], rows),
    ]
