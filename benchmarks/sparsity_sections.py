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
