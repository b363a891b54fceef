"""Make a head profile for `--sparsity duoattention`: which KV heads of a model retrieve.

    python benchmarks/profile_heads.py --model smollm2-135m --out FILE      # minutes on a CPU

See `kvarn/bench/head_profile.py` for what is measured. The file says how it was made.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvarn.bench.head_profile import FIRST_SEED, profile, texts_of
from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.models.load import load


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--sinks", type=int, default=16, help="positions a streaming head sees")
    parser.add_argument("--window", type=int, default=48)
    said = parser.parse_args()
    model = load(resolve({"model": said.model, "dtype": "float32", "device": "cpu"}))
    spec = model.spec
    if model.tokenizer is None:
        raise ConfigError(f"heads are profiled on words, and {said.model!r} has no tokenizer")
    if any(spec.window(layer) is not None for layer in range(spec.n_layers)):
        raise ConfigError(f"{said.model!r} has sliding-window layers, whose heads all stream")
    texts = texts_of(model.tokenizer, said.texts)
    scores = profile(model.decoder, texts, said.sinks, said.window)
    found = {
        "model": said.model,
        "measure": "KL divergence of the answer where this head alone streams [nats a token]",
        "texts": said.texts, "first_seed": FIRST_SEED, "sinks": said.sinks, "window": said.window,
        "tokens": [len(text.tokens) for text in texts],
        "scores": [[round(score, 6) for score in row] for row in scores],
    }  # fmt: skip
    said.out.write_text(written(found), encoding="utf-8")


def written(found: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for the scores of each layer."""
    entries = [f'"{key}": {json.dumps(value)}' for key, value in found.items() if key != "scores"]
    rows = ",\n  ".join(map(json.dumps, found["scores"]))
    return "{\n " + ",\n ".join(entries) + f',\n "scores": [\n  {rows}\n ]\n}}\n'


if __name__ == "__main__":
    main()
