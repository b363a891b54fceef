"""Bad input: each a clear error in OpenAI's form, on that request alone."""

import httpx
import pytest

OK = {"prompt": "say:fine|"}
LONG = {"prompt": "x" * 5000}


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({}, "prompt", "required"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": [1, "a"]}, "prompt", "valid"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": [9999]}, "prompt", "outside the vocabulary"),
        (LONG, "prompt", "at most 4095"),
        ({**OK, "temperature": -1}, "temperature", "temperature must be"),
        ({**OK, "n": 100000}, "n", "n must be"),
        ({**OK, "n": 10**30}, "n", "less than"),
        ({**OK, "seed": 10**30}, "seed", "less than"),
        ({**OK, "max_tokens": "many"}, "max_tokens", "integer"),
        ({**OK, "logit_bias": {"a": 1}}, "logit_bias", "integer"),
        ({**OK, "max_token": 3}, "max_token", "did you mean 'max_tokens'"),
        ({**OK, "stream_options": {"usage": True}}, "usage", "did you mean 'include_usage'"),
        ({**OK, "suffix": "x"}, "suffix", "not supported"),
        ({**OK, "best_of": 3}, "best_of", "not supported"),
        ({**OK, "response_format": {"type": "yaml"}}, "response_format", "'json_schema'"),
        ({**OK, "response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({**OK, "guided_regex": "a", "guided_json": {}}, "guided_regex", "together"),
        ({**OK, "guided_json": "{"}, None, "not valid JSON"),
        ({**OK, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
    ],
)
def test_bad_field(http: httpx.Client, body, param, words) -> None:
    found = error(http.post("/v1/completions", json=body), 400)
    assert words in found["message"]
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    body = {**OK, "user": "me", "best_of": 1, "suffix": None, "metadata": {"a": "b"}, "stop": None}
    assert http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "raw, code",
    [
        (b"{bad", "invalid_json"),
        (b"", "invalid_json"),
        (b'{"prompt": "\xff\xfe"}', "invalid_utf8"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_body"),
        (b"null", "invalid_body"),
    ],
)
def test_bad_bytes(http: httpx.Client, raw: bytes, code: str) -> None:
    found = error(http.post("/v1/chat/completions", content=raw), 400)
    assert found["code"] == code


def test_not_a_number(http: httpx.Client) -> None:
    raw = b'{"prompt": "x", "temperature": NaN}'
    found = error(http.post("/v1/completions", content=raw), 400)
    assert found["param"] == "temperature"


def test_unknown_model(http: httpx.Client) -> None:
    for response in (
        http.post("/v1/completions", json={**OK, "model": "gpt-9"}),
        http.get("/v1/models/gpt-9"),
    ):
        found = error(response, 404)
        assert found["code"] == "model_not_found"
        assert "'fake'" in found["message"]


def test_unknown_path_and_method(http: httpx.Client) -> None:
    assert "/v1/completions" in error(http.post("/v1/completion"), 404)["message"]
    assert "it takes POST" in error(http.get("/v1/completions"), 405)["message"]


def test_too_large_body(start) -> None:
    server = start("max_body=1000")
    found = error(server.http.post("/v1/completions", json={"prompt": "x" * 2000}), 413)
    assert "1000 bytes" in found["message"]
    chunked = (b"x" * 600 for _ in range(3))
    assert error(server.http.post("/v1/completions", content=chunked), 413)


def test_api_key(start) -> None:
    server = start("api_key=secret", "cors=http://page.example")
    assert server.http.get("/health").status_code == 200
    assert error(server.http.get("/v1/models"), 401)["code"] == "invalid_api_key"
    wrong = server.http.get("/v1/models", headers={"authorization": "Bearer no"})
    assert "wrong API key" in error(wrong, 401)["message"]
    right = {"authorization": "Bearer secret"}
    assert server.http.get("/v1/models", headers=right).status_code == 200
    page = server.http.get("/v1/models", headers={**right, "origin": "http://page.example"})
    assert page.headers["access-control-allow-origin"] == "http://page.example"


def test_no_tokenizer(start) -> None:
    server = start("tokenizer=none")
    found = error(server.http.post("/v1/completions", json=OK), 400)
    assert found["code"] == "no_tokenizer"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert error(server.http.post("/v1/chat/completions", json=chat), 400)["code"] == "no_tokenizer"
    ids = {"prompt": list(b"say:x|"), "logprobs": 1, "echo": True}
    (choice,) = server.http.post("/v1/completions", json=ids).json()["choices"]
    assert choice["logprobs"]["tokens"][-1] == "token_id:257"


def test_request_id_goes_in_and_out(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=OK, headers={"x-request-id": "mine-7"})
    assert response.headers["x-request-id"] == "mine-7"
