"""Options of the server (those of the engine are in `kvarn.core.config`)."""

from dataclasses import dataclass
from typing import Literal

from kvarn.core.config import option


@dataclass(slots=True)
class ServeOptions:
    """How the server listens, whom it lets in, and what it takes."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any free one")
    api_key: str | None = option(None, "clients must send it as `Authorization: Bearer KEY`")
    cors: tuple[str, ...] = option((), "origins whose web pages may call the server; * for all")
    served_model_name: str | None = option(None, "name in the API; None: the model option as given")
    max_body: int = option(16 << 20, "largest request body", "bytes")
    max_prompts: int = option(1024, "most prompts in one request")
    drain_timeout: float = option(60.0, "time for open requests to finish after SIGTERM", "s")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "what is logged")
    tool_format: Literal["auto", "json", "hermes", "llama3"] = option(
        "auto", "how the model writes tool calls; auto: as its chat template says"
    )
