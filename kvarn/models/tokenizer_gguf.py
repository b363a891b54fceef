"""A `tokenizers.Tokenizer` from GGUF metadata: byte-level BPE and SentencePiece-style BPE."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from kvarn.core.errors import ModelError, nearest
from kvarn.models.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  #: token types

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

#: tokenizer.ggml.pre -> patterns that cut the text one after the other, before the merges
PRE: dict[str, tuple[str, ...]] = {
    "default": (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2 + r"|\s+",),
    "smollm": (r"\p{N}", GPT2 + r"|\s+"),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (TEKKEN,),
}
#: these take a whole word that is in the vocabulary without merging
IGNORE_MERGES = ("llama-bpe", "tekken")
#: these begin with a BOS where the metadata does not say
WITH_BOS = ("llama-bpe", "tekken")


def backend_from_gguf(file: GGUFFile, cache: Path) -> Tokenizer | None:
    """The tokenizer in the metadata; None where there is none.

    `cache` is a folder for what takes seconds to build. Raises `ModelError` for an unknown kind.
    """
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    builders: dict[str, Callable[[GGUFFile, Path], Tokenizer]] = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    if kind not in builders:
        raise ModelError(
            f"{file.path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama"
        )
    if "tokenizer.ggml.tokens" not in meta:
        raise ModelError(f"{file.path}: metadata has no tokenizer.ggml.tokens")
    return builders[kind](file, cache)


def _byte_level(file: GGUFFile, cache: Path) -> Tokenizer:
    meta = file.metadata
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise ModelError(f"{file.path}: pre-tokenizer {pre!r} is not supported{nearest(pre, PRE)}")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [_pair(merge) for merge in meta.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in IGNORE_MERGES,
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[pre]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, meta)
    _add_template(tokenizer, meta, bos=pre in WITH_BOS)
    return tokenizer


def _sentencepiece(file: GGUFFile, cache: Path) -> Tokenizer:
    """Built once: the merges must be found from the scores, which takes seconds."""
    digest = hashlib.sha256(file.data[: file.header_bytes].data).hexdigest()
    kept = cache / f"{digest}.json"
    if kept.is_file():
        return Tokenizer.from_file(str(kept))
    meta = file.metadata
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens) or len(types) != len(tokens):
        raise ModelError(f"{file.path}: metadata has no score and type for each token")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_from_scores(tokens, scores, types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_tokens(tokenizer, meta)
    _add_template(tokenizer, meta, bos=True)
    cache.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    tokenizer.save(str(part), pretty=False)
    part.replace(kept)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored third first (as SentencePiece)."""
    pieces = {t: i for i, t in enumerate(tokens) if types[i] in (NORMAL, USER)}
    merges = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = pieces.get(piece[:cut]), pieces.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], i, left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)]


def _add_tokens(tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Control tokens are special; user-defined ones are matched whole, but are text."""
    types = meta.get("tokenizer.ggml.token_type") or []
    tokens = meta["tokenizer.ggml.tokens"]
    special = [t for t, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN)]
    # a piece written with ▁ is met only in normalised text
    user = [
        AddedToken(t, special=False, normalized="▁" in t)
        for t, kind in zip(tokens, types)
        if kind == USER
    ]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens(user)


def _add_template(tokenizer: Tokenizer, meta: dict[str, Any], bos: bool) -> None:
    """BOS before and EOS after a text, where the metadata (or the kind's habit, `bos`) says so."""
    tokens = meta["tokenizer.ggml.tokens"]
    parts, special = ["$A"], []
    for name, wanted, at in (("bos", bos, 0), ("eos", False, 2)):
        number = meta.get(f"tokenizer.ggml.{name}_token_id")
        if meta.get(f"tokenizer.ggml.add_{name}_token", wanted) and number is not None:
            parts.insert(at, tokens[number])
            special.append((tokens[number], number))
    if special:
        tokenizer.post_processor = TemplateProcessing(single=parts, special_tokens=special)
