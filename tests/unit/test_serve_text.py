"""Chats as prompts: parts, tools for templates that know none, continued messages, refusals."""

from typing import Any

import pytest

from kvarn.core.errors import RequestError
from kvarn.serve.openai.protocol import ChatMessage, Tool
from kvarn.serve.text import render_chat

TOOL = Tool.model_validate(
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
)


class Template:
    """A tokenizer with only a chat template, which may know of tools."""

    vocab_size = 10

    def __init__(self, knows_tools: bool = False) -> None:
        self.knows_tools = knows_tools
        self.seen: list[dict[str, Any]] = []

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return []

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        return ""

    def chat(
        self, messages: Any, tools: Any = None, add_generation_prompt: bool = True, **v: Any
    ) -> str:
        self.seen = messages
        if messages[0]["role"] == "tool":
            raise ValueError("the first message cannot be a tool's")
        text = f"[{len(tools)} tools]" if tools and self.knows_tools else ""
        text += "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def message(role: str, content: Any = "hi", **fields: Any) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content, **fields})


def test_plain() -> None:
    text = render_chat(Template(), [message("developer", "be brief"), message("user")])
    assert text == "<system>be brief</><user>hi</><assistant>"


def test_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat(Template(), [message("user", parts)]) == "<user>a\nb</><assistant>"
    with pytest.raises(RequestError, match="'input_audio' is not supported"):
        render_chat(Template(), [message("user", [{"type": "input_audio"}])])


def test_template_that_knows_tools() -> None:
    text = render_chat(Template(knows_tools=True), [message("user")], [TOOL])
    assert text == "[1 tools]<user>hi</><assistant>"


def test_template_that_knows_no_tools() -> None:
    text = render_chat(Template(), [message("user")], [TOOL])
    assert text.startswith("<system>You may call these functions")
    assert '"weather"' in text
    text = render_chat(Template(), [message("system", "be brief"), message("user")], [TOOL])
    assert text.startswith("<system>be brief\n\nYou may call")


def test_earlier_calls_have_arguments_as_objects() -> None:
    template = Template()
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    render_chat(template, [message("user"), message("assistant", None, tool_calls=[call])])
    assert template.seen[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert template.seen[1]["content"] == ""


def test_continued_message() -> None:
    chat = [message("user"), message("assistant", "Well, ")]
    text = render_chat(Template(), chat, continue_final_message=True)
    assert text == "<user>hi</><assistant>Well,"
    with pytest.raises(RequestError, match="needs a last message of the assistant"):
        render_chat(Template(), [message("user")], continue_final_message=True)


def test_what_the_template_refuses() -> None:
    with pytest.raises(RequestError, match="refuses these messages: the first message"):
        render_chat(Template(), [message("tool")])
    with pytest.raises(RequestError, match="messages is empty"):
        render_chat(Template(), [])
    with pytest.raises(RequestError, match="refuses"):
        render_chat(Template(), [message("user")], variables={"tools": []})
