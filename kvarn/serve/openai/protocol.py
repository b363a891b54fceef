"""Request bodies of the OpenAI endpoints.

Every field that is listed is honoured. A field that nobody knows is an error that names the nearest
one; a known field that kvarn cannot honour is an error too, unless its value asks for nothing.

Accepted and without effect, because standard clients send them: `user`, `metadata`, `store`,
`service_tier`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `verbosity`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvarn.core.errors import RequestError, nearest

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
JSONObject = dict[str, Any]

WITHOUT_EFFECT = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "verbosity",
    }
)  # fmt: skip

#: known fields that are not honoured: the values that ask for nothing, and what would work
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((), "fill-in-the-middle is not supported; put what matters into the prompt"),
    "best_of": ((1,), "ask for n sequences and choose yourself"),
    "use_beam_search": ((False,), "use sampling with n"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is not supported"),
    "early_stopping": ((False,), "it belongs to beam search, which is not supported"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "modalities": ((["text"],), "only text is generated"),
    "audio": ((), "only text is generated"),
    "prediction": ((), "leave it out"),
    "web_search_options": ((), "leave it out"),
    "dimensions": ((), "embeddings have the model's own width"),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself"),
    "chat_template": ((), "the model's own chat template is used"),
    "documents": (([],), "pass them in chat_template_kwargs if the template knows them"),
    "spaces_between_special_tokens": ((True,), "leave it out"),
    "logits_processors": (([],), "use logit_bias, bad_words or structured output"),
    "lora_path": ((), "adapters are not supported"),
}


class Body(BaseModel):
    """A body whose fields are all known; null means that the field was not sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or (name in WITHOUT_EFFECT and name not in cls.model_fields):
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                neutral, advice = cls.unsupported[name]
                if value not in neutral:
                    message = f"field {name!r} is not supported: {advice}"
                    raise RequestError(message, param=name, code="unsupported_field")
            else:
                message = f"unknown field {name!r}{nearest(name, cls.model_fields)}"
                raise RequestError(message, param=name, code="unknown_field")
        return kept


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = Field(False, description="a last chunk with `usage` and no choices")
    continuous_usage_stats: bool = Field(False, description="`usage` in every chunk")
    include_obfuscation: bool = Field(False, description="accepted, without effect")


class JSONSchemaFormat(Body):
    """OpenAI's wrapping of a schema."""

    name: str = "schema"
    description: str | None = None
    schema_: JSONObject = Field(alias="schema")
    strict: bool = Field(True, description="the schema always holds, whatever this says")

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        return data


class ResponseFormat(Body):
    """`text`, `json_object` or `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's way to ask for structured output: exactly one of these."""

    json_: JSONObject | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool = False

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        return data


class Sampling(Body):
    """Fields that completions and chat share."""

    model: str | None = Field(None, description="the served model; may be left out")
    n: Int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[TokenId, float] = {}
    bad_words: Texts = []
    allowed_token_ids: TokenIds | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Texts = []
    stop_token_ids: TokenIds = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Int = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int = Field(0, description="lower runs first")
    cache_salt: str = Field("", description="cached prefixes are shared with equal salts only")
    sparsity: str | None = Field(
        None, description="what stays of the KV: none, or a part, as name:field=value,..."
    )
    session: str | None = Field(None, description="conversation or tenant, for scheduling policies")
    return_token_ids: bool = Field(False, description="`token_ids` beside every text")
    return_tokens_as_token_ids: bool = Field(False, description="logprobs name tokens by id")
    timings: bool = Field(False, description="`timings` in the answer")


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Int = 16
    echo: bool = False
    logprobs: Int | None = None
    add_special_tokens: bool = Field(True, description="such as a leading BOS")


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class FunctionCall(BaseModel):
    """A call that the model made earlier."""

    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: str | JSONObject = "{}"


class ToolCall(BaseModel):
    """A call that the model made earlier, with its id."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: list[Any] | None = None


class FunctionSpec(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; only functions exist."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(BaseModel):
    """The function that must be called."""

    name: str


class NamedChoice(BaseModel):
    """`tool_choice` as an object."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)]
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int = 0
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(None, description="a variable of the chat template")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = Field(False, description="the template has them already")
    chat_template_kwargs: JSONObject = {}


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = Field(True, description="scale each embedding to length 1")
    add_special_tokens: bool = True
    priority: Int = 0


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] = []
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    chat_template_kwargs: JSONObject = {}


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False
