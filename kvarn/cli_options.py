"""Flags out of data classes: every field of an options class is a flag, so that none is forgotten.

A field's name, type, default, meaning and unit become `--name`, its type, and its line in `--help`.
Fields made with `kvarn.core.config.option` carry meaning and unit in their metadata; for others the
`#:` comment beside them is read from the source.
"""

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from kvarn.core.config import Resolved, resolve
from kvarn.core.errors import ConfigError, nearest

#: a field's line in the source: name, then what its comment says
COMMENT = re.compile(r"^    (\w+):[^#]*#: (.*)$", re.MULTILINE)


def takes(
    *, skip: tuple[str, ...] = (), defaults: Mapping[str, Any] | None = None, **sources: type
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the fields of data classes as flags.

    `sources` maps a parameter of the command to a data class; the command receives there a dict of
    what was said (nothing that was left out). `defaults` are shown and used instead of the class's
    own. The command's other parameters are as typer understands them.
    """
    own_defaults = dict(defaults or {})

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        given = inspect.signature(command).parameters.values()
        kept = [parameter for parameter in given if parameter.name not in sources]
        flags: dict[str, tuple[str, Any]] = {}
        for group, source in sources.items():
            hints, comments = get_type_hints(source), _comments(source)
            for field in fields(source):
                if field.name not in skip and field.name not in flags:
                    flags[field.name] = (group, hints[field.name])
                    kept.append(_parameter(field, hints[field.name], comments, own_defaults, group))

        @functools.wraps(command)
        def run(**said: Any) -> Any:
            groups: dict[str, dict[str, Any]] = {group: {} for group in sources}
            for name, (group, hint) in flags.items():
                value = said.pop(name)
                if value is not None and value != []:
                    groups[group][name] = convert(name, value, hint)
                elif name in own_defaults:
                    groups[group][name] = own_defaults[name]
            return command(**said, **groups)

        run.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
        return run

    return decorate


def chosen(given: dict[str, Any], model: str | None) -> Resolved:
    """Options in force by flags, positional model and environment; wrong ones raise now."""
    if model is not None and given.setdefault("model", model) != model:
        raise ConfigError(f"two models given: {model!r} and --model {given['model']!r}")
    return resolve(given, os.environ)


def _parameter(
    field: Field[Any], hint: Any, comments: Mapping[str, str], own: Mapping[str, Any], group: str
) -> inspect.Parameter:
    """The typer parameter of one field; None (nothing said) is always its default."""
    flag = field.name.replace("_", "-")
    doc = field.metadata.get("doc") or comments.get(field.name, "")
    unit = field.metadata.get("unit", "")
    default = own.get(field.name, _default(field))
    notes = [note for note in (unit, f"default: {shown(default)}") if note]
    kind = _flag_type(hint)
    names = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
    info = typer.Option(
        None, *names, help=f"{doc} ({'; '.join(notes)})", show_default=False,
        rich_help_panel=f"{group.capitalize()} options",
    )  # fmt: skip
    annotation = list[str] | None if kind is list else kind | None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation
    )


def shown(value: Any) -> str:
    """A default as a user would type it."""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value)


def convert(name: str, value: Any, hint: Any) -> Any:
    """What typer parsed, as the field's type; what cannot be converted is a `ConfigError`."""
    hint = _bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"option {name!r} cannot be {value!r}{nearest(value, args)}")
        return value
    if origin is tuple and args[0] is str:
        return tuple(value)
    try:
        if origin is tuple:
            return tuple(args[0](part) for part in value.replace(",", " ").split())
        if origin is dict:
            pairs = [part.partition(":") for text in value for part in text.split(",")]
            return {args[0](key): args[1](number) for key, _, number in pairs}
    except ValueError:
        wanted = "ID:VALUE pairs" if origin is dict else f"{args[0].__name__}s such as 1,2,3"
        raise ConfigError(f"option {name!r} must be {wanted}, not {value!r}") from None
    return value


def _bare(hint: Any) -> Any:
    """The type beside None."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _flag_type(hint: Any) -> Any:
    """What typer parses for a field: bool, int, float, str, or list for a repeatable flag."""
    hint = _bare(hint)
    origin = get_origin(hint)
    if origin is dict or (origin is tuple and get_args(hint)[0] is str):
        return list
    return hint if hint in (bool, int, float) else str


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _comments(source: type) -> dict[str, str]:
    """Meaning of each field by its `#:` comment; nothing where the source is not at hand."""
    if all("doc" in field.metadata for field in fields(source)):
        return {}
    try:
        return dict(COMMENT.findall(inspect.getsource(source)))
    except (OSError, TypeError):
        return {}
