"""Structured output: which tokens may come next under a JSON schema, regular expression or grammar.

`GrammarCompiler` compiles and caches, and tells whether a grammar is sound before its request is
queued. A `Matcher` follows one sequence: `allowed(output)` is a function of the grammar and the
output alone. The output may be shorter than, or differ from, what was asked about before (rejected
drafts, preemption): the matcher rolls back to what both have in common.

When nothing can follow, only an end-of-sequence token is allowed. Special tokens never stand for
text. The work is done by the llguidance library, imported when the first grammar arrives.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.core.errors import RequestError
from kvarn.core.request import Grammar

#: white space between the tokens of JSON: enough for indented text, but no endless run of blanks,
#: into which small models fall
JSON_WHITESPACE = r"[ \t\n\r]{0,64}"


#: of a long error message, this much of its start and of its end is shown [characters]
SHOWN = 300

#: from text to token ids, with no special tokens added
Encode = Callable[[str], Sequence[int]]

KIND_NAMES = {"json_schema": "JSON schema", "regex": "regular expression"}


class Tokenizer(Protocol):
    """What is needed of `kvarn.models.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def backend(self) -> Any: ...

    def token_bytes(self, token: int) -> bytes: ...

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


class _Words:
    """The vocabulary in the shape that llguidance reads."""

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Collection[int], eos_id: int, encode: Encode
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._encode = encode
        special = set(special_ids)
        self._ids = {word: i for i, word in enumerate(tokens) if word and i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of text that the grammar leaves no choice about.

        The model's own way to write it, unless the tokenizer adds to the text (SentencePiece puts
        a space before it).
        """
        ids = list(self._encode(text.decode(errors="replace")))
        if b"".join(self.tokens[i] for i in ids) == text:
            return ids
        return self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(at + self._longest, len(text)), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break  # no token begins with this byte: the rest cannot be written
            ids.append(self._ids[text[at:end]])
            at = end
        return ids


class GrammarCompiler:
    """Compiled grammars of one vocabulary; the most recently used stay ready."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: Collection[int],
        eos_ids: Collection[int],
        vocab: int,
        encode: Encode,
        size: int = 64,
    ) -> None:
        """`tokens[i]` are the bytes of token i, `vocab` the width of the logits, `size` how many
        grammars stay compiled.
        """
        if not eos_ids:
            raise RequestError(
                "structured output needs an end-of-sequence token, and this model has none",
                param="grammar",
                code="not_supported",
            )
        self.vocab = vocab
        self.eos_ids = sorted(eos_ids)
        self._tokens = tokens
        self._encode = encode
        self._special_ids = set(special_ids) | set(eos_ids)
        self._size = size
        self._ready: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def of(cls, tokenizer: Tokenizer, eos_ids: Collection[int], vocab: int) -> "GrammarCompiler":
        """For the vocabulary of a tokenizer."""
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        added = tokenizer.backend.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special]
        return cls(tokens, special, eos_ids, vocab, lambda text: tokenizer.encode(text, False))

    def check(self, grammar: Grammar) -> str | None:
        """What is wrong with a grammar, or None. A sound one is ready when its request starts."""
        try:
            self._compiled(grammar)
        except RequestError as error:
            return error.message
        return None

    def matcher(self, grammar: Grammar, ignore_eos: bool = False) -> "Matcher":
        """A matcher for one sequence; raises `RequestError` for a malformed grammar."""
        return Matcher(self._compiled(grammar).deep_copy(), self, ignore_eos)

    @cached_property
    def _vocabulary(self) -> Any:
        import llguidance

        words = _Words(self._tokens, self._special_ids, self.eos_ids[0], self._encode)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=self.eos_ids)

    def _compiled(self, grammar: Grammar) -> Any:
        import llguidance

        with self._lock:
            if grammar in self._ready:
                self._ready.move_to_end(grammar)
                return self._ready[grammar]
            limits = llguidance.LLParserLimits(verbose_errors=False)
            matcher = llguidance.LLMatcher(
                self._vocabulary, _translate(grammar), log_level=0, limits=limits
            )
            matcher.compute_bitmask()  # some faults show only when the first token is asked for
            if matcher.is_error():
                raise _malformed(grammar, _reason(matcher))
            self._ready[grammar] = matcher
            if len(self._ready) > self._size:
                self._ready.popitem(last=False)
            return matcher


def _reason(matcher: Any) -> str:
    message: str = matcher.get_error()
    return message.replace("<non-verbose/>", "").strip()


def _malformed(grammar: Grammar, why: str) -> RequestError:
    kind = KIND_NAMES.get(grammar.kind, "grammar")
    why = why.strip()
    if len(why) > 2 * SHOWN:  # it quotes the source
        why = f"{why[:SHOWN]} ... {why[-SHOWN:]}"
    return RequestError(
        f"the {kind} cannot be used: {why}", param="grammar", code="invalid_grammar"
    )


def _translate(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        grammar.source.encode()
    except UnicodeEncodeError:
        raise _malformed(grammar, "it is not valid Unicode (a lone surrogate?)") from None
    json_options: Any = {"whitespace_pattern": JSON_WHITESPACE}
    if grammar.kind == "json":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=json_options)
    if grammar.kind == "json_schema":
        try:
            json.loads(grammar.source)
            return LLMatcher.grammar_from_json_schema(grammar.source, defaults=json_options)
        except (ValueError, RecursionError) as error:
            raise _malformed(grammar, f"it is not valid JSON: {error}") from None
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    try:
        # EBNF comes as Lark ("start: ...") or as llama.cpp's GBNF ("root ::= ...")
        return LLMatcher.grammar_from_lark(any_to_lark(grammar.source))
    except Exception as error:  # the converter raises plain Exception for some malformed input
        raise _malformed(grammar, str(error)) from None


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, state: Any, compiler: GrammarCompiler, ignore_eos: bool) -> None:
        self._state = state
        self._compiler = compiler
        self._ignore_eos = ignore_eos
        self._consumed = np.zeros(0, np.int32)

    def allowed(self, output: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Tokens [vocab] that may follow `output`, the tokens generated so far.

        With `ignore_eos`, the end is put off for as long as the grammar allows anything else.
        Raises `RequestError` when the output does not match the grammar (a rejected draft does
        not either: positions behind one are never used).
        """
        self._follow(output)
        bits = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        self._raise_error()
        vocab = self._compiler.vocab
        known = np.unpackbits(bits, count=min(bits.size * 8, vocab), bitorder="little")
        mask = np.zeros(vocab, np.bool_)  # the logits may be wider than the tokenizer's vocabulary
        mask[: known.size] = known
        if self._ignore_eos:
            without_end = mask.copy()
            without_end[self._compiler.eos_ids] = False
            return without_end if without_end.any() else mask
        return mask

    def _follow(self, output: NDArray[np.int32]) -> None:
        """Bring the state to the end of `output`."""
        n = min(len(output), len(self._consumed))
        differs = np.flatnonzero(output[:n] != self._consumed[:n])
        common = int(differs[0]) if differs.size else n
        if len(self._consumed) > common:
            self._state.rollback(len(self._consumed) - common)
        new = output[common:].tolist()
        done = self._state.try_consume_tokens(new) if new else 0
        self._raise_error()
        self._consumed = output[: common + done].copy()
        if done == len(new):
            return
        ended = self._state.is_stopped() and new[done] in self._compiler.eos_ids
        if not ended:
            raise RequestError(
                f"the output does not match the grammar from its token {common + done} on",
                param="grammar",
                code="grammar_violated",
            )

    def _raise_error(self) -> None:
        if self._state.is_error():
            raise RequestError(
                f"the grammar cannot be followed any further: {_reason(self._state)}",
                param="grammar",
                code="grammar_failed",
            )
