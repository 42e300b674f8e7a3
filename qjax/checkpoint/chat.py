"""Chat templates: from messages to the prompt text that the model was trained on.

The template is a Jinja program that comes with the checkpoint; `template_sandbox` keeps it from
doing harm. No request can bring its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qjax.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import jinja2

_LONGEST_TEMPLATE = 1 << 15  # characters; the longest in use have some 17,000
_DEEPEST_MESSAGE = 32
# Arguments of tool calls put out as they are, or put together with text.
_PUTS_ARGUMENTS = re.compile(r"""arguments['"]?\]?\s*(\+|~|-?\}\})""")


class ChatTemplate:
    """A chat template, compiled when first used.

    Args:
      text: the template.
      special_tokens: names such as "bos_token" -> text, which the template may use.
      file: where the template is from, for messages.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str], file: str | None = None):
        self.text = text
        self._special_tokens = dict(special_tokens)
        self._file = file

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for `messages`.

        Args:
          tools: functions that the model may call, in OpenAI's form: {"type": "function",
            "function": {"name", "description", "parameters"}}. Arguments of calls in `messages`
            are JSON text, as OpenAI has them; templates that write them as JSON get objects.

        Raises:
          RequestError: the messages or tools are not such as the template takes.
          CheckpointError: the template is faulty, or asks for too much memory or time.
        """
        from qjax.checkpoint.template_sandbox import Excess, Refusal, render

        given = _plain(messages)
        for message in given:
            if not isinstance(message, dict) or "role" not in message:
                raise RequestError(
                    f"a message must be a dict with role and content, got {str(message)[:60]!r}"
                )
            if not _PUTS_ARGUMENTS.search(self.text):
                _open_arguments(message)
        given_tools = _plain(tools or [], what="tools")
        if not isinstance(given_tools, list) or not all(isinstance(t, dict) for t in given_tools):
            raise RequestError(f"tools must be a list of dicts, got {str(tools)[:60]!r}")
        variables = {
            "tools": given_tools or None,
            "documents": None,
            **self._special_tokens,
            "messages": given,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._compiled
        try:
            return render(template, variables)
        except Refusal as refusal:
            raise RequestError(f"the chat template refuses the messages: {refusal}") from None
        except Excess as excess:
            self._fail(str(excess))
        except Exception as error:
            self._fail(f"fails on these messages: {type(error).__name__}: {str(error)[:200]}")

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        from qjax.checkpoint.template_sandbox import compile_template

        if len(self.text) > _LONGEST_TEMPLATE:
            self._fail(
                f"has {len(self.text):,} characters; at most {_LONGEST_TEMPLATE:,} are allowed"
            )
        try:
            return compile_template(self.text)
        except Exception as error:
            line = getattr(error, "lineno", None)
            place = "" if line is None else f" (line {line})"
            self._fail(f"does not compile: {type(error).__name__}: {str(error)[:200]}{place}")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(reason, file=self._file, field="chat_template") from None


def _open_arguments(message: dict[str, Any]) -> None:
    """Makes objects of arguments that are JSON text."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                function["arguments"] = _plain(arguments)


def _plain(value: Any, depth: int = 0, what: str = "messages") -> Any:
    """A copy made of dict, list, str, numbers and None: all that a template gets to see."""
    if depth > _DEEPEST_MESSAGE:
        raise RequestError(f"{what} are nested more than {_DEEPEST_MESSAGE} deep")
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1, what) for item in value]
    raise RequestError(
        f"{what} must be made of dict, list, str, numbers and None, not {type(value).__name__}"
    )
