"""Between texts and token ids: prompts in all forms, chats through the model's template."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from kvarn.core.errors import RequestError
from kvarn.serve.openai.protocol import ChatMessage, Tool
from kvarn.serve.service import Service, Tokenizer

#: texts above this are tokenised beside the event loop [characters]
LONG = 4096


def need_tokenizer(service: Service, param: str | None = None) -> Tokenizer:
    """The tokenizer; an error when the model has none."""
    if service.tokenizer is None:
        raise RequestError(
            "this model was loaded without a tokenizer; send token ids",
            param=param,
            code="no_tokenizer",
        )
    return service.tokenizer


async def encode(tokenizer: Tokenizer, text: str, add_special: bool) -> list[int]:
    """Token ids of a text."""
    if len(text) < LONG:
        return tokenizer.encode(text, add_special)
    return await asyncio.to_thread(tokenizer.encode, text, add_special)


async def prompts(
    service: Service,
    given: str | list[str] | list[int] | list[list[int]],
    add_special: bool,
    param: str,
) -> list[list[int]]:
    """Token ids of each prompt: a text, texts, token ids, or lists of token ids."""
    if isinstance(given, str):
        given = [given]
    if not given:
        raise RequestError(f"{param} is empty", param=param, code="empty")
    if isinstance(given[0], int):
        return [given]
    if len(given) > service.options.max_prompts:
        raise RequestError(
            f"{len(given)} prompts in one request; the limit is {service.options.max_prompts}",
            param=param,
            code="too_many",
        )
    if isinstance(given[0], list):
        return given
    tokenizer = need_tokenizer(service, param)
    return [await encode(tokenizer, text, add_special) for text in given]


def token_text(tokenizer: Tokenizer | None, token: int, by_id: bool = False) -> str:
    """One token as logprobs show it."""
    if by_id or tokenizer is None:
        return f"token_id:{token}"
    return tokenizer.decode([token], skip_special=False)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] = (),
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """The prompt of a chat; raises `RequestError` with what the template had to say."""
    if not messages:
        raise RequestError("messages is empty", param="messages", code="empty")
    if continue_final_message and (messages[-1].role != "assistant" or not messages[-1].content):
        raise RequestError(
            "continue_final_message needs a last message of the assistant with some content",
            param="continue_final_message",
        )
    plain = [_plain(message) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools] or None
    generate = add_generation_prompt and not continue_final_message
    try:
        text = tokenizer.chat(plain, described, generate, **(variables or {}))
        if described and text == tokenizer.chat(plain, None, generate, **(variables or {})):
            plain = _with_instructions(plain, described)
            text = tokenizer.chat(plain, None, generate, **(variables or {}))
    except RequestError:
        raise
    except Exception as error:  # templates are programs that come with the model
        raise RequestError(
            f"the model's chat template refuses these messages: {error}",
            param="messages",
            code="chat_template",
        ) from None
    return _cut_after(text, plain[-1]["content"]) if continue_final_message else text


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates expect it."""
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _content(message: ChatMessage) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        if part.type not in ("text", "input_text", "refusal") or part.text is None:
            raise RequestError(
                f"content of type {part.type!r} is not supported; this model takes "
                '{"type": "text", "text": ...}',
                param="messages",
                code="unsupported_content",
            )
        texts.append(part.text)
    return "\n".join(texts)


def _arguments(arguments: str | dict[str, Any]) -> Any:
    """Arguments as an object: templates print them as JSON themselves."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _with_instructions(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Describe the tools in a system message, for templates that know nothing of tools."""
    lines = [
        "You may call these functions (JSON schemas):",
        *(json.dumps(tool["function"]) for tool in tools),
        'To call one, answer with JSON alone: {"name": <function>, "arguments": <object>}',
    ]
    text = "\n".join(lines)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _cut_after(text: str, content: str) -> str:
    """The prompt up to the end of the last message's content."""
    at = text.rfind(content.strip())
    if at < 0:
        raise RequestError(
            "the model's chat template changes the last message, so it cannot be continued",
            param="continue_final_message",
        )
    return text[: at + len(content.strip())]
