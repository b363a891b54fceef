"""The official `openai` client against the server: chat, completions, streams, tools, schemas."""

import json
from collections.abc import Iterator

import openai
import pytest

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(text: str) -> list:
    return [{"role": "user", "content": f"say:{text}|"}]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake"
    assert client.models.retrieve("fake").owned_by == "kvarn"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=say("hello"))
    (choice,) = answer.choices
    assert choice.message.content == "hello"
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("user: say:hello|\nassistant: ")
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_content_in_parts_and_roles(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("say:a", "b|")]},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].message.content == "a\nb"


def test_image_is_refused(client: openai.OpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    messages = [{"role": "user", "content": [part]}]
    with pytest.raises(openai.BadRequestError, match="'image_url' is not supported"):
        client.chat.completions.create(model="fake", messages=messages)


def test_limits_by_both_names(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "x"}], **{name: 3}
        )
        assert answer.choices[0].message.content == "the"
        assert answer.choices[0].finish_reason == "length"


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake",
            messages=say("hé"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == ["h", "", "é", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].metrics.keys() == {"queue_time_ms", "time_to_first_token_ms"}
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=say("hi"), logprobs=True, top_logprobs=2
    )
    first, *_ = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
    assert [t.token for t in first.top_logprobs] == ["h", "A"]
    chunks = client.chat.completions.create(
        model="fake", messages=say("hi"), logprobs=True, stream=True
    )
    tokens = [
        t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content
    ]
    assert tokens == ["h", "i", "</s>"]


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=say("x"), n=3)
    assert [c.message.content for c in answer.choices] == ["x"] * 3


def test_tool_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=say(CALL), tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_tool_call_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="fake", messages=say(CALL), tools=TOOLS, stream=True)
    )
    pieces = [t for c in chunks for t in c.choices[0].delta.tool_calls or []]
    assert pieces[0].function.name == "weather"
    assert pieces[0].id
    assert all(p.id is None for p in pieces[1:])
    assert json.loads("".join(p.function.arguments for p in pieces)) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_named_tool_makes_the_answer_its_arguments(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model="fake", messages=say('{"city": "Oslo"}'), tools=TOOLS, tool_choice=choice
    )
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert answer.choices[0].finish_reason == "stop"


def test_required_tools_and_one_call_only(client: openai.OpenAI) -> None:
    calls = f"[{CALL}, {CALL}]"
    for parallel, n in ((True, 2), (False, 1)):
        answer = client.chat.completions.create(
            model="fake",
            messages=say(calls),
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=parallel,
        )
        assert len(answer.choices[0].message.tool_calls) == n


def test_tool_that_is_not_there(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "wether"}}
    with pytest.raises(openai.BadRequestError, match="did you mean 'weather'"):
        client.chat.completions.create(
            model="fake", messages=say("x"), tools=TOOLS, tool_choice=choice
        )


def test_tools_turned_off(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=say(CALL), tools=TOOLS, tool_choice="none"
    )
    assert answer.choices[0].message.content == CALL


def test_answers_of_tools_go_back_to_the_model(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="fake", messages=say(CALL), tools=TOOLS)
    message = first.choices[0].message
    messages = [
        *say(CALL),
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "say:sun|"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "sun"


def test_json_schema_and_parse(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    answer = client.chat.completions.parse(
        model="fake", messages=say('{"name": "Oslo"}'), response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Oslo")


def test_final_message_continues(client: openai.OpenAI) -> None:
    messages = [*say("x"), {"role": "assistant", "content": "say:more|"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(model="fake", messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == "more"
    assert answer.usage.prompt_tokens == len("user: say:x|\nassistant: say:more|")


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["say:a|", "say:b|"], logprobs=1)
    assert [c.text for c in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs.tokens == ["a", "</s>"]
    stream = client.completions.create(model="fake", prompt="say:abc|", stream=True)
    assert "".join(c.choices[0].text for c in stream) == "abc"


def test_embeddings(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="fake", input=["ab", "abc"])  # base64 by default
    two = client.embeddings.create(model="fake", input=["ab", "abc"], encoding_format="float")
    assert [e.index for e in one.data] == [0, 1]
    assert one.data[1].embedding == pytest.approx(two.data[1].embedding, abs=1e-6)
    assert sum(x * x for x in two.data[0].embedding) == pytest.approx(1.0)
    assert one.usage.prompt_tokens == 7
    raw = client.embeddings.create(
        model="fake", input="ab", encoding_format="float", extra_body={"normalize": False}
    )
    assert raw.data[0].embedding == [3.0, 256.0 + 97 + 98, 1.0]


def test_errors_have_their_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server serves 'fake'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.APIError, match="the script says fail!"):
        list(client.completions.create(model="fake", prompt="fail!", stream=True))


async def _many(url: str) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def one(number: int) -> str:
            answer = await client.chat.completions.create(model="fake", messages=say(f"n{number}"))
            return answer.choices[0].message.content

        return await asyncio.gather(*(one(number) for number in range(40)))


def test_many_at_once(server) -> None:
    import asyncio

    assert asyncio.run(_many(server.url)) == [f"n{number}" for number in range(40)]
