"""Runs chat templates, which are foreign code, within bounds of memory and time.

Jinja's sandbox keeps a template from Python's internals, but lets it make `'a' * 10**9` or loop for
hours. Here whatever can make or walk something large goes through a `_Meter`, which knows how many
characters and items a render may still make and how much processor time it may still use, and
refuses before the thing is made:

- Operators, calls and printed values by hooks that Jinja has for them.
- Literals, comparisons, slices, `~` and loops, for which it has none, by rewriting the template's
  syntax tree so that their values pass through a filter.
- Filters and methods by a list of the ones that chat templates use; the others do not exist.

So no value is ever larger, counting everything in it as often as it is there, than what the meter
allowed, and one step costs at most milliseconds. The allowance grows with the messages, never with
what the template asks for.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import filters, nodes, runtime
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MOST_NODES = 4000  # of the syntax tree; the largest in use has some 1,200
_FREE_UNITS = 1 << 20  # characters and items that any render may make
_UNITS_PER_GIVEN = 16  # and for each one of the messages
_SECONDS = 0.25  # of processor time
_SECONDS_PER_GIVEN = 1e-6
_MOST_BITS = 1 << 12  # of an integer
_LONGEST_SEARCH = 1 << 24  # length of a text times that of what is looked for in it
_METER = "the meter"  # its place among the variables: no name that a template could write


class Refusal(Exception):
    """A template called raise_exception."""


class Excess(Exception):
    """A template asked for more than it may have."""


def compile_template(text: str) -> jinja2.Template:
    """Compiles a chat template. Raises Excess, jinja2.TemplateError, or Python's own errors."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing may be computed before there is a meter
        finalize=_print,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters = _metered_filters()
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's, of at most 100,000
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    tree = environment.parse(text)
    if sum(1 for _ in tree.find_all(nodes.Node)) > _MOST_NODES:
        raise Excess(f"has more than {_MOST_NODES} parts")
    tree = _MeterEverything().visit(tree).set_environment(environment)
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, dict(environment.globals))


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text that a compiled template makes of plain variables.

    Raises:
      Refusal: the template calls raise_exception.
      Excess: it asks for too much.
      Exception: anything else that goes wrong in it.
    """
    return "".join(template.generate({**variables, _METER: _Meter(_size(variables))}))


# --- counting -------------------------------------------------------------------------------------


class _Meter:
    """What one render may still make and use.

    Args:
      given: size of its variables.
    """

    def __init__(self, given: int):
        self._units = _FREE_UNITS + _UNITS_PER_GIVEN * given
        # Of this thread alone: a busy machine is not the template's fault.
        self._deadline = time.thread_time() + _SECONDS + _SECONDS_PER_GIVEN * given

    def spend(self, units: int = 1) -> None:
        """Counts characters or items that are about to be made; raises Excess."""
        self._units -= units
        if self._units < 0:
            raise Excess("makes a text or a list that is far longer than the messages")
        if time.thread_time() > self._deadline:
            raise Excess("takes too long")

    def spend_all(self, value: Any) -> None:
        """Counts a value and all that is in it."""
        self.spend(_size(value, self._units))

    def spend_outside(self, value: Any) -> Any:
        """Counts a value without what is in it; returns it."""
        self.spend(1 + len(value) if isinstance(value, (str, list, tuple, dict)) else 1)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend()
            yield value


def _size(value: Any, most: int = 1 << 40) -> int:
    """Characters and items in a value, repeated ones repeatedly. Stops soon after `most`."""
    total, left = 0, [value]
    while left and total <= most:
        found = left.pop()
        if isinstance(found, str):
            total += 1 + len(found)
        elif isinstance(found, (list, tuple)):
            total += 1 + len(found)
            left.extend(found[: max(most - total + 1, 0)])
        elif isinstance(found, dict):
            total += 1 + 2 * len(found)
            left.extend(found)
            left.extend(found.values())
        elif found is None or isinstance(found, (int, float, jinja2.Undefined)):
            total += 1
        else:  # printing it could print anything
            raise Excess(f"puts a {type(found).__name__} into a text or list")
    return total


def _meter(context: runtime.Context) -> _Meter:
    return context.parent[_METER]


# --- the environment ------------------------------------------------------------------------------

_METHODS = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
        "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper".split()
    ),
    dict: frozenset("get items keys values".split()),
    list: frozenset("count index".split()),
    tuple: frozenset("count index".split()),
    int: frozenset(),
    float: frozenset(),
}


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        meter, sequence = _meter(context), (str, list, tuple)
        meter.spend()
        if operator == "+" and isinstance(left, sequence) and isinstance(right, sequence):
            meter.spend(len(left) + len(right))
            # What is in a sum is in its parts, so to count each shorter part is to count it all.
            meter.spend_all(min(left, right, key=len))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            for one, times in ((left, right), (right, left)):
                if isinstance(one, sequence) and isinstance(times, int):
                    meter.spend(len(one) * max(times, 0))
                    meter.spend(_size(one, meter._units) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not available in chat templates")
        return super().call_binop(context, operator, left, right)

    def call(self, context: runtime.Context, callee: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend()
        text = getattr(callee, "__self__", None)
        if isinstance(text, str):
            if callee.__name__ == "join":
                args = (list(meter.each(args[0])),)
                meter.spend_all(args[0])
                meter.spend(len(text) * len(args[0]))
            elif callee.__name__ == "replace":
                _meter_replace(meter, text, *args)
            for arg in args:
                if isinstance(arg, str):
                    _check_search(text, arg)
        elif callee is dict or (
            isinstance(callee, runtime.Macro) and (callee.catch_varargs or callee.catch_kwargs)
        ):
            meter.spend_all((args, kwargs))
        return meter.spend_outside(super().call(context, callee, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if self._is_banned(obj, attribute):
            return self.getitem(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, str) and self._is_banned(obj, argument):
            if isinstance(obj, dict) and argument in obj:
                return obj[argument]
            raise SecurityError(
                f"{type(obj).__name__}.{argument} is not available in chat templates"
            )
        return super().getitem(obj, argument)

    @staticmethod
    def _is_banned(obj: Any, attribute: str) -> bool:
        for kind, allowed in _METHODS.items():
            if isinstance(obj, kind):
                return hasattr(kind, attribute) and attribute not in allowed
        return False


class _GenerationTag(Extension):
    """`{% generation %}` marks what training should learn from; here its body simply stands."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's way)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MeterEverything(NodeTransformer):
    """Leads what has no hook of its own through filters that meter it."""

    def _through(self, name: str, node: Any) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        return nodes.Const(node.data, lineno=node.lineno)  # constants are metered when printed

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(_EACH, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(_WHOLE, node) if node.ctx == "load" else node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(_WHOLE, node)

    visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._through(_STEP, node)

    visit_Test = visit_Getitem = visit_Compare


# --- what templates can use -----------------------------------------------------------------------

# Names that no template can write as a filter.
_EACH, _WHOLE, _STEP = "each of", "whole of", "step of"


@jinja2.pass_context
def _print(context: runtime.Context, value: Any) -> str:
    _meter(context).spend_all(value)
    text = str(value)
    _meter(context).spend(len(text))
    return text


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise Excess(f"makes an integer of more than {_MOST_BITS} bits")


def _check_search(text: str, wanted: str) -> None:
    if len(text) * len(wanted) > _LONGEST_SEARCH:
        raise Excess("looks for a long text in a long text")


def _meter_replace(meter: _Meter, text: str, old: str, new: str, *_: Any) -> None:
    _check_search(text, old)
    meter.spend(text.count(old) * len(new))


def _replace(meter: _Meter, value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = str(value), str(old), str(new)
    _meter_replace(meter, text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _join(meter: _Meter, values: Any, separator: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = [value[attribute] for value in values]
    separator = str(separator)
    meter.spend(len(separator) * len(values))
    return separator.join(map(str, values))


def _indent(
    meter: _Meter, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    text = str(value)
    meter.spend((text.count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width)))
    return filters.do_indent(text, width, first, blank)


def _tojson(
    meter: _Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers has it: nothing is escaped for HTML.
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 16:
        raise Excess("indents JSON by more than 16")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(meter.spend_outside(part) for part in encoder.iterencode(value))


def _trim(meter: _Meter, value: Any, chars: str | None = None) -> str:
    _check_search(str(value), chars or "")
    return str(value).strip(chars)


def _round(meter: _Meter, value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 16:
        raise Excess("rounds to more than 16 digits")
    return filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:500])


def _strftime_now(form: str) -> str:
    if not re.fullmatch(r"([^%]|%[-_^#]?[A-Za-z%]){0,200}", form):
        raise Excess(f"asks for the time in the form {form[:40]!r}")
    return datetime.now().strftime(form)


# Filters that take the meter first, print what they are given and return text.
_TEXT_FILTERS: dict[str, Callable[..., Any]] = {
    "replace": _replace,
    "join": _join,
    "indent": _indent,
    "tojson": _tojson,
    "trim": _trim,
    "string": lambda meter, value: str(value),
    "safe": lambda meter, value: str(value),
    "upper": lambda meter, value: str(value).upper(),
    "lower": lambda meter, value: str(value).lower(),
    "capitalize": lambda meter, value: str(value).capitalize(),
    "title": lambda meter, value: filters.do_title(value),
    "round": _round,
}
# Jinja's own, which make nothing larger than what they are given.
_PLAIN_FILTERS = (
    *("abs", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "sort", "unique"),
)


@functools.cache
def _metered_filters() -> dict[str, Callable[..., Any]]:
    found = {name: _metered_text_filter(function) for name, function in _TEXT_FILTERS.items()}
    for name in _PLAIN_FILTERS:
        found[name] = _metered_plain_filter(filters.FILTERS[name], deep=name == "map")

    @jinja2.pass_context
    def each(context: runtime.Context, values: Any) -> Iterator[Any]:
        return _meter(context).each(values)

    @jinja2.pass_context
    def whole(context: runtime.Context, value: Any) -> Any:
        _meter(context).spend_all(value)
        return value

    @jinja2.pass_context
    def step(context: runtime.Context, value: Any) -> Any:
        return _meter(context).spend_outside(value)

    return found | {_EACH: each, _WHOLE: whole, _STEP: step}


def _metered_text_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_context
    def metered(context: runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        if isinstance(value, Iterator):
            value = list(meter.each(value))
        meter.spend_all((value, args, kwargs))
        return meter.spend_outside(function(meter, value, *args, **kwargs))

    return metered


def _metered_plain_filter(function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
    wants = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def metered(context: runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        if isinstance(value, Iterator):
            value = list(meter.each(value))
        meter.spend_outside(value)
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(wants.name if wants is not None else "", ())
        result = function(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            result = list(meter.each(result))
        if deep:
            meter.spend_all(result)
        return meter.spend_outside(result)

    return metered
