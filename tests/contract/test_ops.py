"""Health, metrics, server_info, tokens, the prefix cache, the native endpoint."""

import json

import httpx
from prometheus_client.parser import text_string_to_metric_families


def scrape(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        s.name + "".join(f"[{v}]" for k, v in sorted(s.labels.items()) if k != "le"): s.value
        for family in families
        for s in family.samples
        if "le" not in s.labels
    }


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ready"}
    assert http.get("/version").json()["version"]


def test_metrics_count_what_was_done(http: httpx.Client) -> None:
    before = scrape(http)
    http.post("/v1/completions", json={"prompt": "say:abc|", "n": 2})
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
    http.post("/v1/completions", json={"prompt": "x", "n": 1000})
    http.post("/v1/completions", json={"prompt": "fail!"})
    after = scrape(http)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew("kvarn_requests_total[stop]") == 1
    assert grew("kvarn_requests_total[length]") == 1
    assert grew("kvarn_requests_total[error]") == 1
    assert grew("kvarn_requests_refused_total[invalid_value]") == 1
    assert grew("kvarn_output_tokens_total") == 4 + 4 + 5
    assert grew("kvarn_prompt_tokens_total") == 9 + 2 + 6
    assert grew("kvarn_time_to_first_token_seconds_count") == 3
    assert grew("kvarn_inter_token_latency_seconds_count") == 3 + 3 + 4
    assert grew("kvarn_time_per_output_token_seconds_count") == 3
    assert grew("kvarn_request_latency_seconds_count") == 3
    assert grew("kvarn_queue_time_seconds_count") == 3
    assert after["kvarn_engine_ready"] == 1
    assert after["kvarn_kv_usage_ratio"] == 0


def test_server_info(http: httpx.Client) -> None:
    info = http.get("/server_info").json()
    assert info["model"] == "fake"
    assert info["state"] == "ready"
    assert info["spec"]["vocab"] == 259
    names = {row["option"] for row in info["explain"]["options"]}
    assert "page_size" in names
    assert info["stats"]["kv_pages"] == 4096


def test_prefix_cache_reset(http: httpx.Client) -> None:
    assert http.post("/reset_prefix_cache").json() == {"success": True}


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer["tokens"] == [256, *"hé".encode()]
    assert answer["count"] == 4
    assert answer["max_model_len"] == 4096
    assert answer["token_strs"][:2] == ["<s>", "h"]
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back["prompt"] == "<s>hé"
    plain = http.post("/tokenize", json={"prompt": "h", "add_special_tokens": False}).json()
    assert plain["tokens"] == [104]
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert http.post("/tokenize", json=chat).json()["count"] == len("user: x\nassistant: ")
    assert http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_generate(http: httpx.Client) -> None:
    body = {"text": "say:abc|", "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
    answer = http.post("/generate", json=body).json()
    assert answer["text"] == "ab"
    assert answer["output_ids"] == [97, 98]
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 2}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (9, 2, 0)


def test_generate_forms(http: httpx.Client) -> None:
    ids = http.post("/generate", json={"input_ids": list(b"say:a|"), "return_logprob": True}).json()
    assert ids["text"] == "a"
    assert ids["meta_info"]["finish_reason"] == {"type": "stop", "matched": 257}
    assert ids["meta_info"]["output_token_logprobs"][0] == [-0.5, 97, "a"]
    many = http.post("/generate", json={"text": ["say:a|", "say:b|"]}).json()
    assert [answer["text"] for answer in many] == ["a", "b"]
    assert http.post("/generate", json={}).status_code == 400
    wrong = http.post("/generate", json={"text": "x", "sampling_params": {"max_tokens": 1}})
    assert "max_new_tokens" in wrong.json()["error"]["message"]


def test_generate_stream_has_the_text_so_far(http: httpx.Client) -> None:
    with http.stream("POST", "/generate", json={"text": "say:abc|", "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert [json.loads(line)["text"] for line in lines[:-1]] == ["a", "ab", "abc", "abc"]
