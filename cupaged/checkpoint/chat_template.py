"""Chat templates: messages -> the prompt text a model was trained on, rendered in a sandbox as Hugging Face renders it."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cupaged.errors import CheckpointError, InvalidArgument


def find_chat_template(folder: Path, tokenizer_config: dict) -> str | None:
    """The model's template: the file chat_template.jinja, else the key `chat_template` (a string, or a list of
    {"name", "template"} of which "default" is meant), else None."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Download the file again.") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((e.get("template") for e in template if isinstance(e, dict) and e.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of named templates. "
            "Download the file again or remove the key."
        )
    return template


def render(template: str, messages: list[dict], **variables: object) -> str:
    """The text of a conversation; `variables` are what the template sees besides `messages`.

    Raises:
        InvalidArgument: the messages are malformed, the template refuses them, or the template itself fails.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument('The messages are not a list of messages. Give [{"role": "user", "content": "..."}].')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidArgument(f'The message {_one_line(repr(message))} lacks a text "role" or "content". Give both.')
    try:
        return _compile(template).render(messages=messages, tools=None, documents=None, **variables)
    except _Refusal as error:
        raise InvalidArgument(
            f"The model's chat template refuses: {_one_line(str(error))}. Change the messages or send a raw prompt."
        ) from error
    except Exception as error:  # a template is a program of somebody else: it can fail in any way
        raise InvalidArgument(
            f"The model's chat template fails: {type(error).__name__}: {_one_line(str(error))}. Send a raw prompt instead."
        ) from error


class _Refusal(jinja2.TemplateError):
    """raise_exception() was called."""


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training: here, just its contents."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object) -> str:
    """Unlike jinja2's own filter, escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".!")
    return text if len(text) <= 300 else f"{text[:297]}..."
