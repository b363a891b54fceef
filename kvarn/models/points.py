"""The named points of a decoder, in TransformerLens' vocabulary: what a tap sees and may change.

A tap is called as `tap(point, layer, x)` and returns the tensor that the computation goes on with
(`x` itself to leave it alone). T rows, the positions of all sequences of the step, flattened.
Points of the whole model come with layer `WHOLE_MODEL`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Tap = Callable[[str, int, Tensor], Tensor]

WHOLE_MODEL = -1  #: the layer of points that belong to no layer


@dataclass(slots=True, frozen=True)
class Point:
    """One named point: the shape of its tensor and what it means."""

    name: str
    shape: str
    meaning: str
    per_layer: bool = True


POINTS: tuple[Point, ...] = (
    Point("embed", "[T, hidden]", "token embedding, scaled where the family does", per_layer=False),
    Point("resid_pre", "[T, hidden]", "residual stream that enters the layer"),
    Point("attn_norm", "[T, hidden]", "normalised input of the attention"),
    Point("q", "[T, heads, head_dim]", "queries with bias, before their norm and rope"),
    Point("k", "[T, kv_heads, head_dim]", "keys with bias, before their norm and rope"),
    Point("v", "[T, kv_heads, head_dim]", "values with bias, as cached"),
    Point("q_rot", "[T, heads, head_dim]", "queries after their norm and rope, as attended with"),
    Point("k_rot", "[T, kv_heads, head_dim]", "keys after their norm and rope, as cached"),
    Point("z", "[T, heads, head_dim]", "attention-weighted sum of values, by head"),
    Point("attn_out", "[T, hidden]", "what the attention adds to the residual stream"),
    Point("resid_mid", "[T, hidden]", "residual stream between attention and MLP"),
    Point("mlp_norm", "[T, hidden]", "normalised input of the MLP"),
    Point("mlp_act", "[T, ffn]", "neurons: act(gate) * up"),
    Point("mlp_out", "[T, hidden]", "what the MLP adds to the residual stream"),
    Point("resid_post", "[T, hidden]", "residual stream that leaves the layer"),
    Point("final_norm", "[T, hidden]", "normalised output of the last layer", per_layer=False),
    Point("logits", "[R, vocab]", "logits of the asked-for rows, fp32, capped", per_layer=False),
)
