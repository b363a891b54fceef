"""Requests as the well-known benchmark clients send them, and what these clients read back."""

import json

import httpx
import pytest

LENGTH = 7

VLLM_COMPLETIONS = {
    "model": "fake",
    "prompt": "x",
    "repetition_penalty": 1.0,
    "max_tokens": LENGTH,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "ignore_eos": True,
}
VLLM_TOKENS = {**VLLM_COMPLETIONS, "prompt": [1, 2, 3]}
VLLM_CHAT = {
    "model": "fake",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "max_completion_tokens": LENGTH,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "ignore_eos": True,
}
SGLANG_COMPLETIONS = {
    "model": "fake",
    "prompt": "x",
    "temperature": 0.0,
    "best_of": 1,
    "max_tokens": LENGTH,
    "stream": True,
    "ignore_eos": True,
}
SGLANG_CHAT = {
    "model": "fake",
    "messages": [{"role": "user", "content": "x"}],
    "temperature": 0.0,
    "max_tokens": LENGTH,
    "stream": True,
    "ignore_eos": True,
}
SGLANG_NATIVE = {
    "text": "x",
    "sampling_params": {"temperature": 0.0, "max_new_tokens": LENGTH, "ignore_eos": True},
    "stream": True,
    "lora_path": None,
    "return_logprob": False,
    "return_routed_experts": False,
    "logprob_start_len": -1,
}
SGLANG_NATIVE_IDS = {
    **{key: value for key, value in SGLANG_NATIVE.items() if key != "text"},
    "input_ids": [1, 2, 3],
}
AIPERF_CHAT = {
    "messages": [
        {"role": "system", "content": "You are a mill."},
        {"role": "user", "content": "x"},
    ],
    "model": "fake",
    "stream": True,
    "max_completion_tokens": LENGTH,
    "stream_options": {"include_usage": True},
    "min_tokens": LENGTH,
    "ignore_eos": True,
}
AIPERF_COMPLETIONS = {
    "prompt": ["x"],
    "model": "fake",
    "stream": True,
    "max_tokens": LENGTH,
    "stream_options": {"include_usage": True},
}
GUIDELLM_COMPLETIONS = {
    "model": "fake",
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "max_tokens": LENGTH,
    "stop": None,
    "ignore_eos": True,
    "prompt": "x",
}
GUIDELLM_CHAT = {
    "model": "fake",
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "max_completion_tokens": LENGTH,
    "stop": None,
    "ignore_eos": True,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
}

TEXT = "the mil"
COMPLETIONS = {
    "vllm": VLLM_COMPLETIONS,
    "vllm token ids": VLLM_TOKENS,
    "sglang": SGLANG_COMPLETIONS,
    "aiperf": AIPERF_COMPLETIONS,
    "guidellm": GUIDELLM_COMPLETIONS,
}
CHATS = {
    "vllm": VLLM_CHAT,
    "sglang": SGLANG_CHAT,
    "aiperf": AIPERF_CHAT,
    "guidellm": GUIDELLM_CHAT,
}


def data(http: httpx.Client, url: str, body: dict) -> list[dict]:
    with http.stream("POST", url, json=body, headers={"x-request-id": "bench-1"}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def check_usage(body: dict, chunks: list[dict]) -> list[dict]:
    """The chunks with choices, after a look at those that carry usage."""
    if "stream_options" not in body:
        assert all(chunk["choices"] for chunk in chunks)  # SGLang reads choices[0] of every chunk
        return chunks
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == LENGTH
    assert chunks[-1]["usage"]["prompt_tokens"] > 0
    return chunks[:-1]


@pytest.mark.parametrize("client", COMPLETIONS)
def test_completions(http: httpx.Client, client: str) -> None:
    body = COMPLETIONS[client]
    chunks = check_usage(body, data(http, "/v1/completions", body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert len(chunks) == LENGTH  # one a token: inter-token latencies are counted by chunk


@pytest.mark.parametrize("client", CHATS)
def test_chat(http: httpx.Client, client: str) -> None:
    body = CHATS[client]
    chunks = check_usage(body, data(http, "/v1/chat/completions", body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert deltas[0]["role"] == "assistant"
    assert len(deltas) == 1 + LENGTH


@pytest.mark.parametrize("body", [SGLANG_NATIVE, SGLANG_NATIVE_IDS], ids=["text", "ids"])
def test_sglang_native(http: httpx.Client, body: dict) -> None:
    chunks = data(http, "/generate", body)
    assert chunks[-1]["text"] == TEXT
    assert [c["meta_info"]["completion_tokens"] for c in chunks] == list(range(1, LENGTH + 1))
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": LENGTH}


def test_what_clients_ask_before_they_begin(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert http.get("/get_server_info").status_code == 200
    assert http.post("/flush_cache").status_code == 200
    assert http.get("/health").status_code == 200
