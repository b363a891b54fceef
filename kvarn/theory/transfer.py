"""What moving KV and activations costs at least, and when computation hides it.

Times in seconds, sizes in bytes, bandwidths in bytes per second; `bytes_per_value` is that of the
stored type. The formulas use only sums, products and maxima, so `Fraction`s stay exact. Sources:
the pipelines are derived in the docstrings; the collectives' volumes are those of ring algorithms.
"""

import math

from kvarn.core.errors import ConfigError


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_value: float) -> float:
    """Keys and values of one position: 2 layers kv_heads head_dim bytes (grouped or full heads)."""
    return 2 * layers * kv_heads * head_dim * bytes_per_value


def latent_bytes_per_token(layers: int, rank: int, rope_dim: int, bytes_per_value: float) -> float:
    """Multi-head latent attention (2405.04434): one latent and one shared RoPE key a layer."""
    return layers * (rank + rope_dim) * bytes_per_value


def whole_finish(prefill: float, layers: int, layer_transfer: float) -> float:
    """When the last layer's KV has arrived if sending starts after the whole prefill [s]."""
    return prefill + layers * layer_transfer


def layerwise_finish(prefill: float, layers: int, layer_transfer: float) -> float:
    """When the last layer's KV has arrived if each layer is sent as soon as it is computed [s].

    Layer l is ready at l tau, tau = prefill / layers, and the link takes one layer at a time, so
    the end is the maximum over l of l tau + (layers - l + 1) x. That is linear in l, hence the
    larger of l = 1 and l = layers.
    """
    if layers < 1:
        raise ConfigError(f"a model has at least one layer, got {layers}")
    return max(prefill + layer_transfer, prefill / layers + layers * layer_transfer)


def is_hidden(kv_bytes: float, prefill_tokens_per_s: float, bandwidth: float) -> bool:
    """Whether layer-wise sending ends one layer's transfer after the prefill, which is the least.

    x <= tau says kappa n / (L BW) <= n / (L rate), hence BW >= kappa rate, whatever n and L > 1.
    """
    return bandwidth >= kv_bytes * prefill_tokens_per_s


def recompute_share(
    kv_bytes: float, bandwidth: float, flops_per_token: float, flops_per_s: float
) -> float:
    """Share of tokens to recompute so that sending the rest ends at the same time, in (0, 1).

    With both going on at once the time is max((1 - r) kappa n / BW, r F n / C); the first falls
    and the second rises in r, so the least is where they meet.
    """
    send, compute = kv_bytes / bandwidth, flops_per_token / flops_per_s
    return send / (send + compute)


def fetch_seconds(
    tokens: int, kv_bytes: float, bandwidth: float, flops_per_token: float, flops_per_s: float
) -> float:
    """Least time to have the KV of `tokens` positions by sending and recomputing at once [s]."""
    share = recompute_share(kv_bytes, bandwidth, flops_per_token, flops_per_s)
    return share * tokens * flops_per_token / flops_per_s


def offload_period(micro_batches: int, attention: float, others: float, link: float) -> float:
    """Time per layer when attention and the rest run on two devices in turn [s].

    A micro-batch takes attention + others + two links a layer, and either device serves one at a
    time: no schedule beats the largest of the three, and serving in turn reaches it.
    """
    if micro_batches < 1:
        raise ConfigError(f"give at least one micro-batch, got {micro_batches}")
    cycle = attention + others + 2 * link
    return max(micro_batches * attention, micro_batches * others, cycle)


def micro_batches_to_hide(attention: float, others: float, link: float) -> int:
    """Fewest micro-batches that keep the slower device busy: 1 + (faster + 2 link) / slower."""
    slow, fast = max(attention, others), min(attention, others)
    if slow <= 0:
        raise ConfigError("one of the two devices must take time; both were given 0 s or less")
    return 1 + math.ceil((fast + 2 * link) / slow)


def offload_bytes(
    heads: int, kv_heads: int, head_dim: int, bytes_per_value: float, *, partial: bool
) -> tuple[float, float]:
    """(sent, returned) per decode token and layer when attention runs elsewhere.

    q, k and v go out; the output comes back, with a maximum and a sum in fp32 per head if it is
    `partial` and has to be merged.
    """
    sent = (heads + 2 * kv_heads) * head_dim * bytes_per_value
    return sent, heads * (head_dim * bytes_per_value + (8 if partial else 0))


def tensor_parallel_bytes(layers: int, hidden: int, ranks: int, bytes_per_value: float) -> float:
    """Sent by one rank per token: two ring all-reduces a layer, each 2 (n - 1) / n of a row."""
    return 2 * layers * 2 * (ranks - 1) * hidden * bytes_per_value / ranks


def expert_parallel_bytes(
    moe_layers: int, top_k: int, hidden: int, ranks: int, bytes_per_value: float
) -> float:
    """Per token, to the experts and back, with experts chosen evenly over `ranks`."""
    return moe_layers * 2 * top_k * hidden * bytes_per_value * (ranks - 1) / ranks


def ring_prefill_bytes(tokens: int, kv_bytes: float, ranks: int) -> float:
    """Sent by one rank of a ring prefill: its part of the KV, once to each of the others."""
    return (ranks - 1) * kv_bytes * tokens / ranks
