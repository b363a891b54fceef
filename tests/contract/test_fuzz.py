"""Whatever is sent, the answer is an answer: no 500, no hang, errors in OpenAI's form.

Bodies are drawn from the server's own OpenAPI document, then damaged.
"""

import json
import random
from functools import cache
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**40, -0.5, 1e308, "", "x", "é\u0000", [], [[]], {}, [0],
    [None], {"a": {"b": []}}, ["say:x|"], [1, "x"], {"type": "function"}, "none",
]  # fmt: skip
#: fields that are kept most of the time, so that most bodies get as far as the engine
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "say:hi|", "max_tokens": 3, "model": "fake"},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "say:hi|"}],
        "max_tokens": 3,
        "max_completion_tokens": 3,
        "model": "fake",
    },
    "/v1/embeddings": {"input": "x", "model": "fake"},
    "/tokenize": {"prompt": "x", "model": "fake"},
    "/detokenize": {"tokens": [97], "model": "fake"},
    "/generate": {"text": "say:hi|", "sampling_params": {"max_new_tokens": 3}},
}
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@cache
def document(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/openapi.json").json()


def operations(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Every POST path with the schema of its body."""
    found = []
    for path, methods in document(url)["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if content:
            found.append((path, content["application/json"]["schema"]))
    return found


def draw(schema: dict[str, Any], defs: dict[str, Any], pick: random.Random, depth: int = 0) -> Any:
    """A value that the schema describes, most of the time."""
    if pick.random() < 0.03:
        return pick.choice(ODD)
    if "$ref" in schema:
        return draw(defs[schema["$ref"].rsplit("/", 1)[-1]], defs, pick, depth)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return draw(pick.choice(schema[key]), defs, pick, depth)
    if "enum" in schema or "const" in schema:
        return pick.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        return draw_object(schema, defs, pick, depth)
    if kind == "array":
        count = pick.randrange(4) if depth < 6 else 0
        return [draw(schema.get("items", {}), defs, pick, depth + 1) for _ in range(count)]
    if kind == "integer":
        return pick.choice([0, 1, 2, 5, 97, 300, -1, 2**40])
    if kind == "number":
        return pick.choice([0, 0.5, 1.0, 2.0, -1.0, 1e9])
    if kind == "boolean":
        return pick.random() < 0.5
    if kind == "string":
        return pick.choice(["x", "say:hi|", "", "user", "ö\n", '{"type": "object"}', "a" * 300])
    return pick.choice(ODD)


def draw_object(
    schema: dict[str, Any], defs: dict[str, Any], pick: random.Random, depth: int
) -> dict[str, Any]:
    properties = schema.get("properties", {})
    required = [name for name in schema.get("required", []) if pick.random() < 0.97]
    others = pick.sample(sorted(properties), min(len(properties), pick.randrange(4)))
    return {name: draw(properties[name], defs, pick, depth + 1) for name in [*required, *others]}


def body_of(url: str, seed: int) -> tuple[str, Any]:
    """A path, and a good body of it with some fields drawn anew."""
    pick = random.Random(seed)
    path, schema = pick.choice(operations(url))
    defs = document(url)["components"]["schemas"]
    drawn = draw(schema, defs, pick)
    if not isinstance(drawn, dict) or pick.random() < 0.1:
        return path, drawn
    if pick.random() < 0.05:
        drawn[pick.choice(["nonsense", "suffix", "user", "max_token"])] = pick.choice(ODD)
    good = GOOD[path]
    kept = {name: good[name] for name in good if name not in drawn or pick.random() < 0.8}
    return path, drawn | kept


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@SETTINGS
@given(seed=st.integers(0, 2**32))
def test_drawn_bodies(server, seed: int) -> None:
    path, body = body_of(server.url, seed)
    check(server.http.post(path, json=body, timeout=10))


@SETTINGS
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/generate", "/tokenize"]),
    raw=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u019 pt', max_size=60).map(str.encode),
)
def test_raw_bytes(server, path: str, raw: bytes) -> None:
    check(server.http.post(path, content=raw, timeout=10))


@SETTINGS
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]),
    path=st.text(max_size=20).map(lambda tail: f"/v1/{tail}"),
)
def test_any_path(server, method: str, path: str) -> None:
    try:
        url = httpx.URL(server.url).copy_with(path=path)
    except httpx.InvalidURL:
        return
    response = server.http.request(method, url, timeout=10)
    assert response.status_code < 500


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_deep_schema(http: httpx.Client, path: str) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(60):
        schema = {"type": "object", "properties": {"a": schema}}
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "guided_json": schema}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    check(http.post(path, content=json.dumps(body), timeout=10))


def test_server_still_answers(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "say:yes|"}).status_code == 200
    assert http.get("/server_info").json()["restarts"] == 0
