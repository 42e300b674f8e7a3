"""How models write tool calls, each way told by the chat template that teaches it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qjax.engine.grammar import WHITESPACE
from qjax.engine.structured_outputs import StructuredOutputs
from qjax.errors import RequestError

if TYPE_CHECKING:
    from qjax.checkpoint.tokenizer import Tokenizer

# Of a reply whose calls are forced: a model that cannot stop is stopped.
_MOST_CALLS = 16
_NAME = "[a-zA-Z0-9_.-]{1,64}"


@dataclass(frozen=True)
class ToolFormat:
    """Attributes:
    name: what vLLM calls its parser.
    begins: marks that open calls. ends: marks that may follow a call.
    header: regular expression of what stands between such a mark and the call's first brace; its
      group is the name, where that does not stand in the object.
    opening, call, between, closing: how a reply of several calls is written; NAME and ARGUMENTS
      stand for these.
    glue: characters that may stand between calls and marks, beside white space.
    bare: calls may begin a reply without a mark.
    short_ids: ids of calls have 9 letters and digits, as the template demands.
    """

    name: str
    begins: tuple[str, ...]
    ends: tuple[str, ...]
    header: str
    opening: str
    call: str
    between: str
    closing: str
    glue: str = ""
    bare: bool = False
    short_ids: bool = False

    @property
    def named(self) -> bool:
        """Whether names stand before the objects, not in them."""
        return not self.call.startswith("{")

    def structured_outputs(
        self,
        tools: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        parallel_tool_calls: bool = True,
    ) -> StructuredOutputs:
        """A grammar of well-formed calls and nothing else, for tool_choice "required".

        Args:
          tools: in OpenAI's form; arguments follow a function's "parameters".
          tokenizer: knows which marks are special tokens.
          name: the one function to call, for a tool_choice that names it.
          parallel_tool_calls: False for exactly one call.

        Raises:
          RequestError: there is no such function, or a name or a schema is out of range.
        """
        functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        if name is not None:
            functions = [each for each in functions if each[0] == name]
            if not functions:
                raise RequestError(f"tool_choice names {name!r:.80}, which is not among the tools.")
        if not functions:
            raise RequestError("tools must hold at least one function, got none.")

        def lark(text: str) -> str:
            return _lark(text, (*self.begins, *self.ends), tokenizer)

        before, after = self.call.split("ARGUMENTS")
        rules = []
        for i, (each, schema) in enumerate(functions):
            call = f"{lark(before.replace('NAME', each))} arguments{i} {lark(after)}"
            rules += [f"call{i}: {call}", f"arguments{i}: %json {json.dumps(schema)}"]
        more = f"({lark(self.between)} call){{0,{_MOST_CALLS - 1}}}" * parallel_tool_calls
        start = f"start: {lark(self.opening)} call {more} {lark(self.closing)}"
        any_call = "call: " + " | ".join(f"call{i}" for i in range(len(functions)))
        return StructuredOutputs(grammar="\n".join([start, any_call, *rules]))


def _function(tool: Any, place: str) -> tuple[str, dict[str, Any]]:
    """(name, schema of the arguments) of a tool."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{place} must have a function, got {tool!r:.80}.")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise RequestError(
            f"{place}.function.name must be 1 to 64 letters, digits, dots, dashes and "
            f"underscores, got {name!r:.80}."
        )
    schema = function.get("parameters")
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{place}.function.parameters must be a schema, got {schema!r:.80}.")
    # Arguments are an object, whatever the schema says.
    return name, {**schema, "type": "object", **WHITESPACE}


def _lark(text: str, marks: Sequence[str], tokenizer: Tokenizer) -> str:
    """A text in Lark's notation; marks that are special tokens of the model, by their ids."""
    found = []
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        ids = tokenizer.encode(part, add_special_tokens=False) if part in marks else []
        special = [i for i in ids if i in tokenizer.special_ids]
        if special:
            found.append(f"<[{special[0]}]>")
        elif part:
            found.append(json.dumps(part, ensure_ascii=False))
    return " ".join(found)


def tool_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches, by the template's own text; None for any other."""
    if "<｜tool▁call▁begin｜>" in chat_template:
        return _DEEPSEEK_V3 if "```json" in chat_template else _DEEPSEEK_V31
    if "[TOOL_CALLS]" in chat_template:
        return _MISTRAL if "[ARGS]" in chat_template else _MISTRAL_LIST
    if "<|tool_call|>" in chat_template:
        return _GRANITE
    if "<tool_call>" in chat_template and "arguments" in chat_template:
        # Of the same mark, but XML inside.
        others = "<function=", "<arg_key>"
        return None if any(other in chat_template for other in others) else _HERMES
    if '"parameters": dictionary of argument name' in chat_template:
        return _LLAMA3
    return None


_JSON_CALL = '{"name": "NAME", "arguments": ARGUMENTS}'
_SPACE = r"\s*"
_LIST = r"\s*\[?\s*"

# Nous Hermes 2 Pro and 3, Qwen 2.5 and 3, SmolLM 3, Granite 4.
_HERMES = ToolFormat(
    name="hermes",
    begins=("<tool_call>",),
    ends=("</tool_call>",),
    header=_LIST,
    opening="<tool_call>\n",
    call=_JSON_CALL,
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
    glue=",]",
)
# Llama 3.1 to 3.3, whose tool token goes before calls of built-in tools only.
_LLAMA3 = ToolFormat(
    name="llama3_json",
    begins=("<|python_tag|>",),
    ends=(),
    header=_SPACE,
    opening="",
    call='{"name": "NAME", "parameters": ARGUMENTS}',
    between="; ",
    closing="",
    glue=";",
    bare=True,
)
# Mistral's, with tokenizers up to version 7, and from 11 on; some write both ways.
_MISTRAL_HEADER = rf"\s*(?:\[|({_NAME})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?)?\s*"
_MISTRAL_LIST = ToolFormat(
    name="mistral",
    begins=("[TOOL_CALLS]",),
    ends=(),
    header=_MISTRAL_HEADER,
    opening="[TOOL_CALLS] [",
    call=_JSON_CALL,
    between=", ",
    closing="]",
    glue=",]",
    short_ids=True,
)
_MISTRAL = ToolFormat(
    name="mistral",
    begins=("[TOOL_CALLS]",),
    ends=(),
    header=_MISTRAL_HEADER,
    opening="[TOOL_CALLS]",
    call="NAME[ARGS]ARGUMENTS",
    between="[TOOL_CALLS]",
    closing="",
    short_ids=True,
)
# Granite 3.
_GRANITE = ToolFormat(
    name="granite",
    begins=("<|tool_call|>",),
    ends=(),
    header=_LIST,
    opening="<|tool_call|>[",
    call=_JSON_CALL,
    between=", ",
    closing="]",
    glue=",]",
)
_DEEPSEEK_ENDS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
# DeepSeek V3 and R1.
_DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ends=_DEEPSEEK_ENDS,
    header=rf"\s*(?:<｜tool▁call▁begin｜>)?function<｜tool▁sep｜>({_NAME})\s*```json\s*",
    opening="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    call="function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```",
    between="<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>",
    closing="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    glue="`",
)
_DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ends=_DEEPSEEK_ENDS,
    header=rf"\s*(?:<｜tool▁call▁begin｜>)?({_NAME})<｜tool▁sep｜>\s*",
    opening="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    call="NAME<｜tool▁sep｜>ARGUMENTS",
    between="<｜tool▁call▁end｜><｜tool▁call▁begin｜>",
    closing="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
