"""From messages and tools, as they come in, to the prompt that the model's chat template makes."""

from collections.abc import Sequence
from typing import Any

import msgspec

from qjax.checkpoint.tokenizer import Tokenizer
from qjax.server.errors import invalid
from qjax.server.protocol import Message, Part, Tool


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    add_generation_prompt: bool,
) -> str:
    """The prompt's text.

    Raises:
      ApiError: a message has something else than text.
      RequestError, CheckpointError: the template refuses them, or fails on them.
    """
    if not messages:
        raise invalid("messages is empty: give at least one message.", "messages")
    return tokenizer.apply_chat_template(
        [_for_template(message, f"messages[{i}]") for i, message in enumerate(messages)],
        add_generation_prompt=add_generation_prompt,
        tools=msgspec.to_builtins(tools) if tools else None,
    )


def _for_template(message: Message, place: str) -> dict[str, Any]:
    # OpenAI's newer name, which templates do not know.
    role = "system" if message.role == "developer" else message.role
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))
    elif content is None and not message.tool_calls:
        raise invalid(f"{place}.content is required.", "messages")
    found = {
        "role": role,
        "content": content or "",
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": message.tool_calls and msgspec.to_builtins(message.tool_calls),
    }
    return {name: value for name, value in found.items() if value is not None}


def _text(part: Part, place: str) -> str:
    if part.type != "text":
        raise invalid(f"{place}.type must be text, got {part.type[:40]!r}.", "messages")
    if part.text is None:
        raise invalid(f"{place}.text is required.", "messages")
    return part.text
