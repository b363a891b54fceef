"""POST /tokenize and /detokenize."""

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from kvarn.core.errors import RequestError
from kvarn.serve.docs import documented
from kvarn.serve.http import json_response, read
from kvarn.serve.openai.protocol import DetokenizeRequest, TokenizeRequest
from kvarn.serve.service import Service
from kvarn.serve.text import encode, need_tokenizer, render_chat, token_text

router = APIRouter()


@router.post("/tokenize", openapi_extra=documented(TokenizeRequest))
async def tokenize(http: HTTPRequest) -> Response:
    """Token ids of a text, or of a chat as the model would see it."""
    service: Service = http.app.state.service
    body = await read(http, TokenizeRequest, service.options.max_body)
    service.check_model(body.model)
    tokenizer = need_tokenizer(service, "prompt")
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either 'prompt' or 'messages'", param="prompt")
    if body.messages is not None:
        text = render_chat(
            tokenizer,
            body.messages,
            body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        ids = await encode(tokenizer, text, bool(body.add_special_tokens))
    else:
        assert body.prompt is not None
        ids = await encode(tokenizer, body.prompt, body.add_special_tokens is not False)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": service.max_len}
    if body.return_token_strs:
        answer["token_strs"] = [token_text(tokenizer, id) for id in ids]
    return json_response(answer)


@router.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
async def detokenize(http: HTTPRequest) -> Response:
    """The text of token ids."""
    service: Service = http.app.state.service
    body = await read(http, DetokenizeRequest, service.options.max_body)
    service.check_model(body.model)
    tokenizer = need_tokenizer(service, "tokens")
    for id in body.tokens:
        if id >= tokenizer.vocab_size:
            raise RequestError(
                f"token id {id} is outside the vocabulary of {tokenizer.vocab_size}",
                param="tokens",
                code="token_out_of_range",
            )
    return json_response({"prompt": tokenizer.decode(body.tokens, body.skip_special_tokens)})
