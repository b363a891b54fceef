"""POST /v1/completions."""

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
from kvarn.serve.openai.logprobs import CompletionLogprobs, join, prompt_logprobs
from kvarn.serve.openai.protocol import CompletionRequest
from kvarn.serve.openai.sampling import asked_grammar, sampling_params
from kvarn.serve.service import Service, new_id
from kvarn.serve.text import prompts

router = APIRouter()


@router.post("/v1/completions", openapi_extra=documented(CompletionRequest))
async def completions(http: HTTPRequest) -> Response:
    """Continue one or more prompts."""
    service: Service = http.app.state.service
    arrival = time.monotonic()
    body = await read(http, CompletionRequest, service.options.max_body)
    service.check_model(body.model)
    call = await service.submit(await _requests(service, body, arrival), http.state.request_id)
    completion = Completion(service, body, call)
    top = answer.head(new_id("cmpl"), "text_completion", service.model)
    if body.stream:
        return EventStream(answer.stream(top, call, body, completion.chunks()))
    try:
        choices = await unless_gone(http, completion.whole())
    finally:
        call.close()
    return json_response({**top, "choices": choices, **answer.tail(call, body)})


async def _requests(service: Service, body: CompletionRequest, arrival: float) -> list[Request]:
    wants_prompt = body.logprobs if body.echo else None
    if body.echo and body.max_tokens == 0 and wants_prompt is None:
        wants_prompt = 0  # the engine has something to do at all
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs are not streamed; leave out 'stream'", param="prompt_logprobs"
        )
    sampling = sampling_params(
        body, body.max_tokens, body.logprobs, asked_grammar(body), wants_prompt
    )
    return [
        Request(
            id=new_id("req"),
            prompt=ids,
            sampling=sampling,
            priority=body.priority,
            arrival=arrival,
            session=body.session,
            cache_salt=body.cache_salt,
            sparsity=body.sparsity,
        )
        for ids in await prompts(service, body.prompt, body.add_special_tokens, "prompt")
    ]


@dataclass(slots=True)
class Choice:
    """One sequence of the answer, as far as it has come."""

    logprobs: CompletionLogprobs
    begun: bool = False
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    stop: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion:
    """Turns the outputs of a call into choices."""

    def __init__(self, service: Service, body: CompletionRequest, call: Call) -> None:
        self.service, self.body, self.call = service, body, call
        self._choices = [
            Choice(CompletionLogprobs(service.tokenizer, body.return_tokens_as_token_ids))
            for _ in call.tallies
        ]

    def _delta(self, output: Output) -> tuple[Choice, str, dict[str, Any] | None]:
        """The text and logprobs that an output adds, the echoed prompt first."""
        choice = self._choices[self.call.choice(output)]
        text, pieces = output.text, []
        if not choice.begun:
            choice.begun = True
            position = self.call.position[output.request_id] // self.body.n
            prompt = self.call.requests[position].prompt
            if self.body.echo:
                text = self._echo(position) + text
                if self.body.logprobs is not None and output.prompt_logprobs is not None:
                    pieces.append(choice.logprobs.of(output.prompt_logprobs, prompt))
        if output.logprobs is not None and self.body.logprobs is not None:
            pieces.append(choice.logprobs.of(list(output.logprobs), output.tokens))
        choice.finish, choice.stop = output.finish, output.stop
        return choice, text, join(pieces) if pieces else None

    def _echo(self, position: int) -> str:
        """The text of a prompt."""
        if isinstance(self.body.prompt, str):
            return self.body.prompt
        given = self.body.prompt[position]
        if isinstance(given, str):
            return given
        if self.service.tokenizer is None:
            return ""
        return self.service.tokenizer.decode(self.call.requests[position].prompt)

    async def chunks(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The choices of each chunk of a stream."""
        async for output in self.call.outputs():
            choice, text, logprobs = self._delta(output)
            chunk: dict[str, Any] = {
                "index": self.call.choice(output),
                "text": text,
                "logprobs": logprobs,
                "finish_reason": output.finish,
            }
            if output.finish is not None:
                chunk["stop_reason"] = choice.stop
            if self.body.return_token_ids:
                chunk["token_ids"] = output.tokens
            yield [chunk]

    async def whole(self) -> list[dict[str, Any]]:
        """The choices of an answer that is not streamed."""
        async for output in self.call.outputs():
            choice, text, logprobs = self._delta(output)
            choice.text.append(text)
            choice.tokens += output.tokens
            if logprobs is not None:
                choice.pieces.append(logprobs)
            if output.prompt_logprobs is not None and self.body.prompt_logprobs is not None:
                choice.prompt_logprobs = prompt_logprobs(
                    output.prompt_logprobs, self.service.tokenizer
                )
        return [self._choice(index, choice) for index, choice in enumerate(self._choices)]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        whole: dict[str, Any] = {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": join(choice.pieces) if choice.pieces else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop,
        }
        if self.body.return_token_ids:
            whole["token_ids"] = choice.tokens
            whole["prompt_token_ids"] = self.call.requests[index // self.body.n].prompt
        if choice.prompt_logprobs is not None:
            whole["prompt_logprobs"] = choice.prompt_logprobs
        return whole
