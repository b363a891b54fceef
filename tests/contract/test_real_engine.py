"""The whole way, with nothing scripted: `kvarn serve` with SmolLM2, and the openai client."""

import json
import os
import signal
from collections.abc import Iterator

import httpx
import openai
import pytest
from conftest import Running

from kvarn.models.pull import pull

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Running]:
    model = pull("smollm2-135m")
    options = ["--port=0", "--max-len=256", "--kv-memory=0.1", "--max-queue=4", "--max-seqs=4"]
    running = Running(
        str(model), "--served-model-name=smol", *options, command=["-m", "kvarn.cli", "serve"]
    )
    running.wait_ready()
    yield running
    assert running.end() == 0


@pytest.fixture(scope="module")
def client(smollm2: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


def test_stream_is_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="smol",
            messages=FRANCE,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "The capital of France is Paris."
    usage = chunks[-1].usage
    assert usage.completion_tokens == len(chunks) - 2  # without the role and the usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 16 * 16
    assert chunks[-1].metrics["time_to_first_token_ms"] > 0


def test_completion_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smol", prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=2,
        echo=True,
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.text == "The capital of France is Paris."
    assert choice.logprobs.tokens == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert choice.logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in choice.logprobs.token_logprobs[1:])
    assert max(choice.logprobs.top_logprobs[5], key=choice.logprobs.top_logprobs[5].get) == " Paris"


def test_token_ids_are_the_text(smollm2: Running, client: openai.OpenAI) -> None:
    text = "The capital of France is"
    ids = smollm2.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    answers = client.completions.create(
        model="smol", prompt=[ids, ids], max_tokens=3, temperature=0
    )
    assert answers.choices[0].text == answers.choices[1].text == " Paris.\n"


def test_seeds(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(
            model="smol", prompt="Once", max_tokens=6, n=2, seed=seed
        )
        return [choice.text for choice in answer.choices]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_json_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Describe a person."}],
        max_tokens=60,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_forced_tool(client: openai.OpenAI, choice) -> None:
    answer = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "How is the weather in Oslo?"}],
        max_tokens=80,
        temperature=0,
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")


def test_choice(client: openai.OpenAI) -> None:
    extra = {"guided_choice": ["yes!", "no (never)"]}
    answer = client.completions.create(model="smol", prompt="Is it?", extra_body=extra)
    assert answer.choices[0].text in extra["guided_choice"]


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["A cat sat on the mat.", "A kitten sat on a rug.", "Interest rates rose in March."]
    for pooling in ("mean", "last"):
        answer = client.embeddings.create(
            model="smol", input=texts, extra_body={"pooling": pooling}
        )
        cat, kitten, rates = (item.embedding for item in answer.data)

        def cosine(a: list[float], b: list[float]) -> float:
            return sum(x * y for x, y in zip(a, b, strict=True))

        assert cosine(cat, cat) == pytest.approx(1.0, abs=1e-4)
        assert cosine(cat, kitten) > cosine(cat, rates)


@pytest.mark.parametrize(
    "body, words",
    [
        ({"prompt": "word " * 300}, "maximum context length is 256"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [49152]}, "outside the vocabulary"),
        ({"prompt": "x", "guided_json": {"type": "nonsense"}}, "JSON schema"),
        ({"prompt": "x", "guided_regex": "[0-9"}, "regular expression"),
        ({"prompt": "x", "stop": ["x"] * 100}, "at most 16"),
    ],
)
def test_bad_input(smollm2: Running, body: dict, words: str) -> None:
    response = smollm2.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_client_that_goes_away(smollm2: Running) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=30) as client:
        url = f"{smollm2.url}/v1/completions"
        with client.stream("POST", url, json=body) as response:
            chunks = response.iter_bytes()
            next(chunks)
            assert smollm2.info["stats"]["kv_pages_used"] > 0
    smollm2.wait(lambda: smollm2.info["stats"]["kv_pages_used"] == 0)
    assert smollm2.info["stats"]["finished"]["abort"] == 1


def test_killed_engine_comes_back(smollm2: Running, client: openai.OpenAI) -> None:
    os.kill(smollm2.info["engine_pid"], signal.SIGKILL)
    smollm2.wait(lambda: smollm2.info["restarts"] == 1)
    smollm2.wait_ready()
    answer = client.completions.create(
        model="smol", prompt="The capital of France is", max_tokens=1, temperature=0
    )
    assert answer.choices[0].text == " Paris"
