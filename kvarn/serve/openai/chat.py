"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from kvarn.core.errors import RequestError
from kvarn.core.output import Output
from kvarn.core.request import Request
from kvarn.serve.call import Call
from kvarn.serve.docs import documented
from kvarn.serve.http import EventStream, json_response, read, unless_gone
from kvarn.serve.openai import answer
from kvarn.serve.openai.logprobs import chat_logprobs, prompt_logprobs
from kvarn.serve.openai.protocol import ChatRequest
from kvarn.serve.openai.sampling import asked_grammar, sampling_params
from kvarn.serve.openai.toolchoice import ToolUse, tool_use
from kvarn.serve.service import Service, new_id
from kvarn.serve.text import encode, need_tokenizer, render_chat
from kvarn.serve.tools import CallDelta, Parsed

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=documented(ChatRequest))
async def chat(http: HTTPRequest) -> Response:
    """Answer a conversation."""
    service: Service = http.app.state.service
    arrival = time.monotonic()
    body = await read(http, ChatRequest, service.options.max_body)
    service.check_model(body.model)
    tools = tool_use(service, body)
    call = await service.submit(
        [await _request(service, body, tools, arrival)], http.state.request_id
    )
    conversation = Conversation(service, body, call, tools)
    id = new_id("chatcmpl")
    if body.stream:
        top = answer.head(id, "chat.completion.chunk", service.model)
        return EventStream(answer.stream(top, call, body, conversation.chunks()))
    try:
        choices = await unless_gone(http, conversation.whole())
    finally:
        call.close()
    top = answer.head(id, "chat.completion", service.model)
    end = answer.tail(call, body)
    return json_response({**top, "choices": choices, **conversation.about_prompt(), **end})


async def _request(
    service: Service, body: ChatRequest, tools: ToolUse | None, arrival: float
) -> Request:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs are not streamed; leave out 'stream'", param="prompt_logprobs"
        )
    tokenizer = need_tokenizer(service, "messages")
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    text = render_chat(
        tokenizer,
        body.messages,
        tools.offered if tools else (),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=variables,
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    grammar = tools.grammar if tools and tools.grammar else asked_grammar(body)
    return Request(
        id=new_id("req"),
        prompt=await encode(tokenizer, text, body.add_special_tokens),
        sampling=sampling_params(body, limit, logprobs, grammar),
        priority=body.priority,
        arrival=arrival,
        session=body.session,
        cache_salt=body.cache_salt,
        sparsity=body.sparsity,
    )


@dataclass(slots=True)
class Choice:
    """One sequence of the answer, as far as it has come."""

    begun: bool = False
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    stop: int | str | None = None


class Conversation:
    """Turns the outputs of a call into choices."""

    def __init__(
        self, service: Service, body: ChatRequest, call: Call, tools: ToolUse | None
    ) -> None:
        self.service, self.body, self.call = service, body, call
        self._choices = [Choice() for _ in range(body.n)]
        self._splitters = [tools.splitter() if tools else None for _ in range(body.n)]
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None

    def _split(self, output: Output) -> Parsed:
        splitter = self._splitters[output.index]
        if splitter is None:
            return Parsed(output.text)
        return splitter.feed(output.text, final=output.finish is not None)

    def _finish(self, output: Output) -> str | None:
        splitter = self._splitters[output.index]
        if output.finish == "stop" and splitter is not None and splitter.ends_with_calls:
            return "tool_calls"
        return output.finish

    def _logprobs(self, output: Output) -> list[dict[str, Any]]:
        return chat_logprobs(
            output.logprobs or [],
            self.service.tokenizer,
            self.body.top_logprobs,
            self.body.return_tokens_as_token_ids,
        )

    async def chunks(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The choices of each chunk of a stream: the role first, then one for every output."""
        async for output in self.call.outputs():
            choice = self._choices[output.index]
            if not choice.begun:
                choice.begun = True
                delta: dict[str, Any] = {"role": "assistant", "content": ""}
                yield [_chunk(output.index, delta)]
            parsed = self._split(output)
            delta = {} if parsed.calls and not parsed.content else {"content": parsed.content}
            if parsed.calls:
                delta["tool_calls"] = [_call_chunk(call) for call in parsed.calls]
            chunk = _chunk(output.index, delta, self._finish(output))
            if self.body.logprobs:
                chunk["logprobs"] = {"content": self._logprobs(output)}
            if output.finish is not None:
                chunk["stop_reason"] = output.stop
            if self.body.return_token_ids:
                chunk["token_ids"] = output.tokens
            yield [chunk]

    async def whole(self) -> list[dict[str, Any]]:
        """The choices of an answer that is not streamed."""
        async for output in self.call.outputs():
            choice = self._choices[output.index]
            parsed = self._split(output)
            choice.content.append(parsed.content)
            for delta in parsed.calls:
                _extend(choice.calls, delta)
            choice.tokens += output.tokens
            choice.logprobs += self._logprobs(output)
            choice.finish, choice.stop = self._finish(output), output.stop
            if output.prompt_logprobs is not None:
                self._prompt_logprobs = prompt_logprobs(
                    output.prompt_logprobs, self.service.tokenizer
                )
        return [self._choice(index, choice) for index, choice in enumerate(self._choices)]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["content"] = content.strip() or None
            message["tool_calls"] = choice.calls
        whole: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs} if self.body.logprobs else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop,
        }
        if self.body.return_token_ids:
            whole["token_ids"] = choice.tokens
        return whole

    def about_prompt(self) -> dict[str, Any]:
        """What the answer says about the prompt, where asked for."""
        about: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            about["prompt_logprobs"] = self._prompt_logprobs
        if self.body.return_token_ids:
            about["prompt_token_ids"] = self.call.requests[0].prompt
        return about


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _call_chunk(call: CallDelta) -> dict[str, Any]:
    chunk: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
    if call.name is not None:
        chunk["id"], chunk["type"] = new_id("call"), "function"
        chunk["function"]["name"] = call.name
    return chunk


def _extend(calls: list[dict[str, Any]], delta: CallDelta) -> None:
    """Add a piece to the calls of a whole answer."""
    if delta.name is not None:
        function = {"name": delta.name, "arguments": ""}
        calls.append({"id": new_id("call"), "type": "function", "function": function})
    calls[delta.index]["function"]["arguments"] += delta.arguments
