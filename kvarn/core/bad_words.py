"""Bad words as token ids: what `SamplingParams.bad_word_ids` is filled with."""

from collections.abc import Callable, Iterable, Sequence


def encode_bad_words(
    texts: Iterable[str], encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each text as it appears at the start of a line and after a space.

    `encode` turns text into ids without special tokens. Both forms are needed because byte-level
    and SentencePiece vocabularies have different tokens for "word" and " word". The sampler bans
    the last token of an entry where the tokens before it stand at the end of the history.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in texts:
        for form in (text, " " + text.lstrip(" ")):
            ids = tuple(encode(form))
            if ids:
                found[ids] = None
    return tuple(found)
