"""/v1/completions over the scripted engine: prompt forms, echo, logprobs, n, streams, errors."""

import json

import httpx
import pytest

URL = "/v1/completions"


def post(http: httpx.Client, **body) -> dict:
    response = http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, url: str, **body) -> list:
    with http.stream("POST", url, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_text_prompt(http: httpx.Client) -> None:
    answer = post(http, model="fake", prompt="say:hello|")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice["text"] == "hello"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == 257
    assert answer["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 6,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["metrics"]["time_to_first_token_ms"] >= 0


@pytest.mark.parametrize(
    "prompt, texts",
    [
        (["say:a|", "say:b|"], ["a", "b"]),
        (list(b"say:c|"), ["c"]),
        ([list(b"say:d|"), list(b"say:e|")], ["d", "e"]),
    ],
)
def test_prompt_forms(http: httpx.Client, prompt, texts) -> None:
    choices = post(http, prompt=prompt)["choices"]
    assert [c["text"] for c in choices] == texts
    assert [c["index"] for c in choices] == list(range(len(texts)))


def test_several_sequences_of_several_prompts(http: httpx.Client) -> None:
    answer = post(http, prompt=["say:a|", "say:b|"], n=3)
    assert [c["text"] for c in answer["choices"]] == ["a"] * 3 + ["b"] * 3
    assert answer["usage"]["prompt_tokens"] == 14
    assert answer["usage"]["completion_tokens"] == 12


def test_limit(http: httpx.Client) -> None:
    answer = post(http, prompt="x")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert post(http, prompt="x", max_tokens=3)["choices"][0]["text"] == "the"


def test_stop_string(http: httpx.Client) -> None:
    (choice,) = post(http, prompt="x", stop=["mill"])["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "mill"


def test_echo_and_logprobs(http: httpx.Client) -> None:
    (choice,) = post(http, prompt="say:ab|", echo=True, logprobs=2)["choices"]
    assert choice["text"] == "say:ab|ab"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", *"say:ab|", "a", "b", "</s>"]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * 10
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-3] == {"a": -0.5, "A": -2.0}
    assert logprobs["text_offset"][:3] == [0, 3, 4]


def test_echo_without_generation(http: httpx.Client) -> None:
    answer = post(http, prompt="abc", echo=True, max_tokens=0, logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs(http: httpx.Client) -> None:
    (choice,) = post(http, prompt="ab", prompt_logprobs=1, max_tokens=1)["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second["97"] == {"logprob": -0.5, "rank": 1, "decoded_token": "a"}
    assert "98" in third


def test_token_ids_and_timings_on_request(http: httpx.Client) -> None:
    answer = post(http, prompt="say:ab|", return_token_ids=True, timings=True)
    assert answer["choices"][0]["token_ids"] == [97, 98, 257]
    assert answer["choices"][0]["prompt_token_ids"] == [256, *b"say:ab|"]
    assert set(answer["timings"]) == {
        "queue_time_ms",
        "time_to_first_token_ms",
        "time_per_output_token_ms",
        "total_time_ms",
    }


def test_stream_has_a_chunk_for_every_step(http: httpx.Client) -> None:
    chunks = events(http, URL, prompt="say:hé|")
    assert [c["choices"][0]["text"] for c in chunks] == ["h", "", "é", ""]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert all("usage" not in c for c in chunks)
    assert len({c["id"] for c in chunks}) == 1


def test_stream_usage(http: httpx.Client) -> None:
    chunks = events(http, URL, prompt="say:hi|", stream_options={"include_usage": True})
    assert [c["usage"] for c in chunks[:-1]] == [None] * 3
    last = chunks[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert set(last["metrics"]) == {"queue_time_ms", "time_to_first_token_ms"}


def test_stream_continuous_usage(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(http, URL, prompt="say:hi|", stream_options=options)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


def test_stream_of_several_choices(http: httpx.Client) -> None:
    chunks = events(http, URL, prompt=["say:ab|", "say:cd|"], n=2, echo=True)
    texts = ["", "", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["say:ab|ab"] * 2 + ["say:cd|cd"] * 2


def test_one_failed_request_is_an_error_of_its_own(http: httpx.Client) -> None:
    response = http.post(URL, json={"prompt": "fail!"})
    assert response.status_code == 422
    assert response.json()["error"]["message"] == "the script says fail!"
    assert post(http, prompt="say:well|")["choices"][0]["text"] == "well"


def test_failure_inside_a_stream_is_an_event(http: httpx.Client) -> None:
    with http.stream("POST", URL, json={"prompt": "fail!", "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "generation_failed"
