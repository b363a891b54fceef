"""Structured output: whatever the logits, the output matches; the matcher follows any history."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from kvarn.core.errors import RequestError
from kvarn.core.request import Grammar, SamplingParams
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.pull import pull
from kvarn.models.tokenizer import Tokenizer
from kvarn.runner.grammar import GrammarCompiler
from kvarn.runner.sampler import Sampler

EOS, OTHER_EOS, SPECIAL = 256, 257, 258
WORDS = [b'{"', b'":', b"true", b'", "', b"ab", b"abc", "é".encode(), b"\xc3", b"12", b"\n  "]
TOKENS = [bytes([i]) for i in range(256)] + [b"<eos>", b"<end>", b"<img>", *WORDS]
VOCAB = 288  #: of the logits; wider than the tokenizer's

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "maybe": {"type": ["null", "boolean"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
BY_SCHEMA = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENS, {SPECIAL}, {EOS, OTHER_EOS}, VOCAB, encode)


def encode(text: str) -> list[int]:
    """Two merges, as a tokenizer would make them; else byte by byte."""
    pieces = re.findall(b"abc|12|[\\x00-\\xff]", text.encode())
    return [TOKENS.index(piece) for piece in pieces]


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def allowed(matcher: Any, output: np.ndarray) -> set[int]:
    return set(np.flatnonzero(matcher.allowed(output)).tolist())


def run_dry(
    compiler: GrammarCompiler, params: SamplingParams, noise: int, prompt: int = 2
) -> list[int]:
    """Generate with random logits until an end-of-sequence token; its output without that."""
    sampler = Sampler(VOCAB, torch.device("cpu"), 0, compiler)
    sampler.start(0, params, (EOS, OTHER_EOS), prompt, noise)
    rng = np.random.default_rng(noise)
    tokens = np.full((1, 4000), ord("x"), np.int32)
    for length in range(prompt, 4000):
        logits = torch.from_numpy(rng.normal(0, 3, (1, VOCAB)).astype(np.float32))
        found = sampler.sample(logits, np.zeros(1, np.int64), np.array([length]), tokens)
        assert not found.errors, found.errors
        if found.tokens[0] in (EOS, OTHER_EOS):
            return tokens[0, prompt:length].tolist()
        tokens[0, length] = found.tokens[0]
    raise AssertionError("no end after 4000 tokens")


def text_of(output: list[int]) -> str:
    assert not {EOS, OTHER_EOS, SPECIAL} & set(output)
    return b"".join(TOKENS[t] for t in output).decode()


@pytest.mark.parametrize("noise", range(6))
def test_any_json_object(compiler: GrammarCompiler, noise: int) -> None:
    params = SamplingParams(grammar=Grammar("json"), temperature=1.5)
    assert isinstance(json.loads(text_of(run_dry(compiler, params, noise))), dict)


@pytest.mark.parametrize("noise", range(8))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema(compiler: GrammarCompiler, noise: int, temperature: float) -> None:
    params = SamplingParams(grammar=BY_SCHEMA, temperature=temperature, top_p=0.95)
    assert_matches_schema(json.loads(text_of(run_dry(compiler, params, noise))))


def assert_matches_schema(found: Any) -> None:
    assert {"name", "age", "tags"} <= set(found) <= set(SCHEMA["properties"])
    assert isinstance(found["name"], str) and len(found["name"]) <= 8
    assert isinstance(found["age"], int) and 0 <= found["age"] <= 150
    assert len(found["tags"]) <= 3 and set(found["tags"]) <= {"a", "b"}
    assert found.get("maybe") in (None, True, False)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}(12|true)?", r"é+\n", r"\d{4}-\d{2}"])
def test_regular_expression(compiler: GrammarCompiler, pattern: str) -> None:
    for noise in range(4):
        params = SamplingParams(grammar=Grammar("regex", pattern), seed=noise)
        assert re.fullmatch(pattern, text_of(run_dry(compiler, params, noise)))


@pytest.mark.parametrize(
    "source", ['start: "ab" | "12" start', 'root ::= "ab" | "12" root'], ids=["lark", "gbnf"]
)
def test_context_free_grammar(compiler: GrammarCompiler, source: str) -> None:
    for noise in range(4):
        params = SamplingParams(grammar=Grammar("ebnf", source))
        assert re.fullmatch(r"(12)*ab", text_of(run_dry(compiler, params, noise)))


def test_only_the_end_follows_a_complete_output(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "ab|abc"))
    assert allowed(matcher, ids("")) == {ord("a"), TOKENS.index(b"ab"), TOKENS.index(b"abc")}
    assert allowed(matcher, ids("ab")) == {ord("c"), EOS, OTHER_EOS}
    assert allowed(matcher, ids("abc")) == {EOS, OTHER_EOS}
    assert allowed(matcher, np.append(ids("abc"), [EOS]).astype(np.int32)) == {EOS, OTHER_EOS}


def test_with_ignore_eos_the_end_comes_only_when_nothing_else_can(
    compiler: GrammarCompiler,
) -> None:
    matcher = compiler.matcher(Grammar("regex", "ab|abc"), ignore_eos=True)
    assert allowed(matcher, ids("ab")) == {ord("c")}
    assert allowed(matcher, ids("abc")) == {EOS, OTHER_EOS}


def test_special_tokens_never_stand_for_text(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "(.|\n)*"))
    mask = matcher.allowed(ids("<"))
    assert not mask[SPECIAL] and mask[EOS] and mask[ord("i")]
    assert not mask[len(TOKENS) :].any()  # ids that the tokenizer does not know


def test_matcher_follows_any_history(compiler: GrammarCompiler) -> None:
    """Longer, shorter, and other outputs in any order give what a fresh matcher gives."""
    old = compiler.matcher(BY_SCHEMA)
    text = '{"name": "xy", "age": 12, "tags": ["a"]}'
    other = '{"name":"z'
    rng = np.random.default_rng(0)
    for _ in range(60):
        source = text if rng.random() < 0.7 else other
        output = ids(source[: rng.integers(0, len(source) + 1)])
        assert allowed(old, output) == allowed(compiler.matcher(BY_SCHEMA), output)


def test_a_rejected_draft_is_an_error_there_and_nowhere_else(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "abab"))
    fresh = allowed(matcher, ids("ab"))
    with pytest.raises(RequestError, match="token 2"):
        matcher.allowed(ids("abxy"))
    assert allowed(matcher, ids("ab")) == fresh
    assert allowed(matcher, ids("aba")) == {ord("b")}


def test_positions_of_one_row_in_one_call(compiler: GrammarCompiler) -> None:
    sampler = Sampler(VOCAB, torch.device("cpu"), 0, compiler)
    params = SamplingParams(grammar=Grammar("regex", "abcabc"), temperature=0)
    sampler.start(0, params, (EOS, OTHER_EOS), 1, 0)
    history = np.append(ids("?"), ids("abcxbc"))[None].astype(np.int32)
    for _ in range(2):
        found = sampler.sample(
            torch.zeros(6, VOCAB), np.zeros(6, np.int64), np.arange(1, 7), history
        )
        abc = TOKENS.index(b"abc")
        assert found.tokens[:4] == [abc, ord("b"), ord("c"), abc]
        assert sorted(found.errors) == [4, 5]  # behind the draft "x", which position 3 refuses


def test_min_tokens_past_a_complete_output_is_an_error(compiler: GrammarCompiler) -> None:
    sampler = Sampler(VOCAB, torch.device("cpu"), 0, compiler)
    params = SamplingParams(grammar=Grammar("regex", "a"), min_tokens=3)
    sampler.start(0, params, (EOS, OTHER_EOS), 1, 0)
    found = sampler.sample(
        torch.zeros(1, VOCAB), np.zeros(1, np.int64), np.array([2]), ids("?a")[None]
    )
    assert "grammar, min_tokens" in found.errors[0]


MALFORMED = [
    Grammar("json_schema", "{"),
    Grammar("json_schema", "[]"),
    Grammar("json_schema", '{"type": "foo"}'),
    Grammar("json_schema", "false"),
    Grammar("json_schema", '{"type": "string", "pattern": "[a"}'),
    Grammar("json_schema", '{"$ref": "http://example.com/schema"}'),
    Grammar("json_schema", "[" * 100_000),
    Grammar("json_schema", '{"$ref": "#"}'),
    Grammar("json_schema", '{"const": "\ud800"}'),
    Grammar("regex", "[a-"),
    Grammar("regex", "(" * 5000),
    Grammar("regex", "\ud800"),
    Grammar("regex", "(?=a)b"),
    Grammar("ebnf", "start: missing"),
    Grammar("ebnf", "a ::= missing"),
    Grammar("ebnf", "<<<"),
    Grammar("ebnf", "\ud800"),
    Grammar("ebnf", "root ::= (" + "(" * 5000),
]


@pytest.mark.parametrize("grammar", MALFORMED, ids=lambda g: f"{g.kind}-{g.source[:20]}")
def test_malformed_grammars_are_refused_with_a_reason(
    compiler: GrammarCompiler, grammar: Grammar
) -> None:
    message = compiler.check(grammar)
    assert message and "cannot be used" in message and len(message) < 2000
    with pytest.raises(RequestError) as caught:
        compiler.matcher(grammar)
    assert (caught.value.param, caught.value.code) == ("grammar", "invalid_grammar")


def test_sound_grammars_pass_the_check_and_are_compiled_once(compiler: GrammarCompiler) -> None:
    for grammar in (
        Grammar("json"),
        BY_SCHEMA,
        Grammar("regex", "a*"),
        Grammar("json_schema", "{}"),
    ):
        assert compiler.check(grammar) is None
        assert compiler._compiled(grammar) is compiler._compiled(grammar)


def test_the_cache_keeps_the_most_recently_used() -> None:
    small = GrammarCompiler(TOKENS, {SPECIAL}, {EOS}, VOCAB, encode, size=2)
    a, b, c = (Grammar("regex", x) for x in "abc")
    first = small._compiled(a)
    small.check(b)
    small.check(a)
    small.check(c)
    assert list(small._ready) == [a, c]
    assert small._compiled(a) is first


def test_matchers_of_one_grammar_are_independent(compiler: GrammarCompiler) -> None:
    one, two = (compiler.matcher(Grammar("regex", "ab")) for _ in range(2))
    assert allowed(one, ids("a")) == {ord("b")}
    assert ord("a") in allowed(two, ids(""))


def test_no_end_of_sequence_token_no_grammars() -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(TOKENS, {SPECIAL}, (), VOCAB, encode)


def test_forced_text_is_written_as_the_tokenizer_writes_it(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "abc12x"))
    assert allowed(matcher, ids("")) == {TOKENS.index(b"abc")}
    assert allowed(matcher, ids("abc")) == {TOKENS.index(b"12")}
    assert allowed(matcher, ids("a")) == {ord("b")}  # however the beginning was written


def test_a_tokenizer_that_adds_a_space_falls_back_to_the_longest_tokens() -> None:
    spaced = GrammarCompiler(
        TOKENS, {SPECIAL}, {EOS}, VOCAB, lambda text: [ord(" "), *text.encode()]
    )
    matcher = spaced.matcher(Grammar("regex", "abc12x"))
    assert allowed(matcher, ids("")) == {TOKENS.index(b"abc")}


def test_white_space_in_json_is_bounded(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("json"))
    assert ord(" ") in allowed(matcher, ids("{" + " " * 63))
    assert ord(" ") not in allowed(matcher, ids("{" + " " * 64))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    """The tokenizer of the default model."""
    found = Tokenizer.from_gguf(GGUFFile(pull("smollm2-135m")))
    assert found is not None
    return found


@pytest.mark.parametrize("noise", range(3))
def test_json_schema_with_a_real_vocabulary(smollm2: Tokenizer, noise: int) -> None:
    vocab = smollm2.vocab_size + 16
    compiler = GrammarCompiler.of(smollm2, smollm2.eos_ids, vocab)
    sampler = Sampler(vocab, torch.device("cpu"), noise, compiler)
    params = SamplingParams(grammar=BY_SCHEMA, temperature=2.0)
    prompt = smollm2.encode("Describe a person as JSON.")
    sampler.start(0, params, smollm2.eos_ids, len(prompt), 0)
    rng = np.random.default_rng(noise)
    tokens = np.zeros((1, 2000), np.int32)
    tokens[0, : len(prompt)] = prompt
    length = len(prompt)
    while True:
        logits = torch.from_numpy(rng.normal(0, 3, (1, vocab)).astype(np.float32))
        found = sampler.sample(logits, np.zeros(1, np.int64), np.array([length]), tokens)
        assert not found.errors
        if found.tokens[0] in smollm2.eos_ids:
            break
        tokens[0, length] = found.tokens[0]
        length += 1
    text = smollm2.decode(tokens[0, len(prompt) : length].tolist(), skip_special=False)
    assert_matches_schema(json.loads(text))
