"""JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from kvarn.core.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `ModelError` when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value
