"""Tool calls found in text, however the text is cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serve.tools import FORMATS, ToolParser, detect

NAMES = ["weather", "time"]
PARIS = '{"city": "Paris", "note": "a } \\" { b"}'
CALL = f'{{"name": "weather", "arguments": {PARIS}}}'
REVERSED = f'{{"arguments": {PARIS}, "name": "weather"}}'
PARAMETERS = f'{{"name": "weather", "parameters": {PARIS}}}'
TIME = '{"name": "time", "arguments": {}}'

ONE = [("weather", PARIS)]
TWO = [*ONE, ("time", "{}")]

CASES = [
    ("json", CALL, "", ONE),
    ("json", f"\n {CALL}\n", "", ONE),
    ("json", REVERSED, "", ONE),
    ("json", f"[{CALL}, {TIME}]", "", TWO),
    ("json", f"```json\n{CALL}\n```", "", ONE),
    ("json", '{"name": "time"}', "", [("time", "{}")]),
    ("json", json.dumps({"name": "time", "arguments": '{"a": 1}'}), "", [("time", '{"a": 1}')]),
    ("json", "It rains.", "It rains.", []),
    ("json", '{"answer": 4}', '{"answer": 4}', []),
    ("json", '{"name": "else", "arguments": {}}', '{"name": "else", "arguments": {}}', []),
    ("json", "{not json}", "{not json}", []),
    ("json", "[1, 2]", "[1, 2]", []),
    ("json", "{}", "{}", []),
    ("json", "", "", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", ONE),
    ("hermes", f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", ONE),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{TIME}\n</tool_call>", "\n", TWO),
    ("hermes", "a < b and <tool> too", "a < b and <tool> too", []),
    ("hermes", "<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
    ("hermes", "ends with <tool_", "ends with <tool_", []),
    ("hermes", CALL, CALL, []),
    ("llama3", f"<|python_tag|>{PARAMETERS}", "", ONE),
    ("llama3", f"{PARAMETERS}; {TIME}", "", TWO),
    ("llama3", "Hello", "Hello", []),
]


def run(format: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that comes in pieces."""
    parser = ToolParser(FORMATS[format], NAMES)
    content, calls = "", []
    for piece in [*pieces, None]:
        parsed = parser.feed(piece or "", final=piece is None)
        content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
    return content, calls


@pytest.mark.parametrize("format, text, content, calls", CASES)
def test_in_one_piece(format: str, text: str, content: str, calls: list) -> None:
    assert run(format, [text]) == (content, calls)


@pytest.mark.parametrize("format, text, content, calls", CASES)
def test_character_by_character(format: str, text: str, content: str, calls: list) -> None:
    assert run(format, list(text)) == (content, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), max_size=30))
def test_in_any_pieces(case: tuple, sizes: list[int]) -> None:
    format, text, content, calls = case
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    assert run(format, [*pieces, text]) == (content, calls)


@given(
    st.sampled_from(sorted(FORMATS)), st.text(alphabet='{}[]",:\\ <>/|`antmeo_lcjsp', max_size=40)
)
def test_nothing_is_lost_when_there_is_no_call(format: str, text: str) -> None:
    content, calls = run(format, list(text))
    if not calls:
        assert content == text


def test_arguments_stream() -> None:
    parser = ToolParser(FORMATS["json"], NAMES)
    assert parser.feed('{"name": "weather", ').calls[0].name == "weather"
    (delta,) = parser.feed('"arguments": {"city": "Pa').calls
    assert delta.arguments == '{"city": "Pa'
    (delta,) = parser.feed('ris"}').calls
    assert delta.arguments == 'ris"}'


def test_cut_off_call_keeps_what_came() -> None:
    content, calls = run("json", ['{"name": "weather", "arguments": {"city": "Pa'])
    assert (content, calls) == ("", [("weather", '{"city": "Pa')])


def test_detect() -> None:
    assert detect("call with <tool_call>{}</tool_call>") == "hermes"
    llama = 'Respond in the format {"name": function name, "parameters": dictionary}. "parameters"'
    assert detect(llama) == "llama3"
    assert detect("user: hello") == "json"
