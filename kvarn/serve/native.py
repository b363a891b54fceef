"""POST /generate in SGLang's shape: text or input_ids, sampling_params, cumulative text."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field
from starlette.responses import Response

from kvarn.core.errors import RequestError
from kvarn.core.output import Output
from kvarn.core.plan import TokenLogprobs
from kvarn.core.request import Grammar, Request, SamplingParams
from kvarn.serve.call import Call
from kvarn.serve.docs import documented
from kvarn.serve.http import DONE, EventStream, event, json_response, read, unless_gone
from kvarn.serve.openai.protocol import Body, Int, Texts, TokenIds
from kvarn.serve.openai.sampling import json_schema
from kvarn.serve.service import Service, new_id
from kvarn.serve.text import prompts, token_text

router = APIRouter()


class NativeSampling(Body):
    """SGLang's names for the sampling fields."""

    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "spaces_between_special_tokens": ((True,), "leave it out"),
        "stop_regex": (([],), "use stop"),
        "structural_tag": ((), "use json_schema"),
        "custom_params": (({},), "leave it out"),
    }
    max_new_tokens: Int = 128
    min_new_tokens: Int = 0
    n: Int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = Field(default={})
    stop: str | Texts = Field(default=[])
    stop_token_ids: TokenIds = Field(default=[])
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None


class GenerateRequest(Body):
    """POST /generate."""

    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "image_data": (("", []), "this model takes text only"),
        "audio_data": (("", []), "this model takes text only"),
        "video_data": (("", []), "this model takes text only"),
        "lora_path": ((), "adapters are not supported"),
        "return_hidden_states": ((False,), "hidden states are not returned"),
        "return_routed_experts": ((False,), "leave it out"),
        "logprob_start_len": ((-1,), "logprobs of the prompt are not part of this endpoint"),
        "session_params": ((), "leave it out"),
        "return_text_in_logprobs": ((True, False), "leave it out"),
        "log_metrics": ((True, False), "leave it out"),
        "bootstrap_host": ((), "leave it out"),
        "bootstrap_room": ((), "leave it out"),
    }
    text: str | Texts | None = None
    input_ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | None = None
    sampling_params: NativeSampling = NativeSampling()
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: Int = 0
    rid: str | None = None
    priority: Int = 0


@router.post("/generate", openapi_extra=documented(GenerateRequest))
async def generate(http: HTTPRequest) -> Response:
    """Continue one or more prompts; each event of a stream has the text so far."""
    service: Service = http.app.state.service
    arrival = time.monotonic()
    body = await read(http, GenerateRequest, service.options.max_body)
    call = await service.submit(await _requests(service, body, arrival), http.state.request_id)
    native = Native(service, body, call)
    if body.stream:
        return EventStream(native.events())
    try:
        await unless_gone(http, native.whole())
    finally:
        call.close()
    answers = [native.answer(index) for index in range(len(call.tallies))]
    return json_response(answers if _is_list(body) or len(answers) > 1 else answers[0])


async def _requests(service: Service, body: GenerateRequest, arrival: float) -> list[Request]:
    given = body.text if body.input_ids is None else body.input_ids
    if given is None or (body.text is not None and body.input_ids is not None):
        raise RequestError("send either 'text' or 'input_ids'", param="text")
    param = "text" if body.input_ids is None else "input_ids"
    sampling = _sampling(body)
    return [
        Request(new_id("req"), ids, sampling, priority=body.priority, arrival=arrival)
        for ids in await prompts(service, given, True, param)
    ]


def _is_list(body: GenerateRequest) -> bool:
    if body.input_ids is not None:
        return bool(body.input_ids) and isinstance(body.input_ids[0], list)
    return isinstance(body.text, list)


def _sampling(body: GenerateRequest) -> SamplingParams:
    asked = body.sampling_params
    return SamplingParams(
        n=asked.n,
        max_tokens=asked.max_new_tokens,
        min_tokens=asked.min_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=asked.logit_bias,
        seed=asked.sampling_seed,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        include_stop=asked.no_stop_trim,
        ignore_eos=asked.ignore_eos,
        logprobs=body.top_logprobs_num if body.return_logprob else None,
        grammar=_grammar(asked),
        skip_special_tokens=asked.skip_special_tokens,
    )


def _grammar(asked: NativeSampling) -> Grammar | None:
    given: list[Grammar] = []
    if asked.json_schema is not None:
        given.append(json_schema(asked.json_schema))
    if asked.regex is not None:
        given.append(Grammar("regex", asked.regex))
    if asked.ebnf is not None:
        given.append(Grammar("ebnf", asked.ebnf))
    if len(given) > 1:
        raise RequestError("send one of json_schema, regex and ebnf", param="sampling_params")
    return given[0] if given else None


@dataclass(slots=True)
class Sequence:
    """One sequence, as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: Output | None = None


class Native:
    """Turns the outputs of a call into SGLang's answers."""

    def __init__(self, service: Service, body: GenerateRequest, call: Call) -> None:
        self.service, self.body, self.call = service, body, call
        self._sequences = [Sequence() for _ in call.tallies]
        self._began = time.monotonic()

    def _take(self, output: Output) -> int:
        index = self.call.choice(output)
        sequence = self._sequences[index]
        sequence.text += output.text
        sequence.tokens += output.tokens
        sequence.logprobs += output.logprobs or []
        sequence.last = output
        return index

    async def whole(self) -> None:
        """Take in everything."""
        async for output in self.call.outputs():
            self._take(output)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events of a stream."""
        try:
            async for output in self.call.outputs():
                index = self._take(output)
                answer = self.answer(index)
                if len(self._sequences) > 1:
                    answer["index"] = index
                yield event(answer)
            yield DONE
        finally:
            self.call.close()

    def answer(self, index: int) -> dict[str, Any]:
        """The answer of one sequence, as of now."""
        sequence = self._sequences[index]
        last = sequence.last
        assert last is not None
        meta: dict[str, Any] = {
            "id": self.body.rid or last.request_id,
            "finish_reason": _finish(last),
            "prompt_tokens": last.n_prompt,
            "completion_tokens": len(sequence.tokens),
            "cached_tokens": last.n_cached,
            "e2e_latency": time.monotonic() - self._began,
        }
        if self.body.return_logprob:
            meta["output_token_logprobs"] = [self._entry(i) for i in sequence.logprobs]
            meta["output_top_logprobs"] = [
                [[p, t, token_text(self.service.tokenizer, t)] for t, p in i.top]
                for i in sequence.logprobs
            ]
        return {"text": sequence.text, "output_ids": list(sequence.tokens), "meta_info": meta}

    def _entry(self, item: TokenLogprobs) -> list[Any]:
        return [item.logprob, item.token, token_text(self.service.tokenizer, item.token)]


def _finish(output: Output) -> dict[str, Any] | None:
    if output.finish is None:
        return None
    if output.finish == "length":
        return {"type": "length", "length": output.n_output}
    return {"type": output.finish, "matched": output.stop}
