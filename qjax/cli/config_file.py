"""`--config FILE.yaml`: options of a command from a file.

    model: org/name
    tensor-parallel-size: 8

Keys are the long names of the command's options, and of arguments that may be left out. What stands
on the command line goes first.
"""

import inspect
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo

from qjax.errors import RequestError, nearest


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes what the file says the defaults of the command's other options."""
    if path is not None and not context.resilient_parsing:
        context.default_map = defaults(path, context.command)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A YAML file of these options (key: value); the command line goes first.",
        callback=_read,
        is_eager=True,
    ),
]


def defaults(path: Path, command: Any) -> dict[str, Any]:
    """Values for parameters of a command, by their names in Python.

    Args:
      path: of a YAML file.
      command: as typer makes it of a function with annotations.

    Raises:
      RequestError: the file cannot be read, a key is no option, or a value is none for it.
    """
    from qjax.checkpoint import strict_yaml

    try:
        found = strict_yaml.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--config: cannot read {path}: {error}") from None
    except ValueError as error:
        raise RequestError(f"--config: {path} {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"--config: {path} holds no keys and values, but {found!r:.80}")
    options = _options(command)
    values = {}
    for key, value in found.items():
        if key not in options:
            hint = nearest(str(key), options) or f"; known are {', '.join(options)}"
            raise RequestError(f"{path}: {key}: no such option{hint}")
        name, kind, info = options[key]
        try:
            values[name] = _checked(value, kind, info)
        except ValueError as error:
            raise RequestError(f"{path}: {key}: {error}") from None
    return values


def _options(command: Any) -> dict[str, tuple[str, Any, ArgumentInfo | OptionInfo]]:
    """{long name: (name of the parameter, its type, what typer was told of it)}."""
    annotations = inspect.signature(command.callback, eval_str=True).parameters
    found = {}
    for option in command.params:
        annotation = annotations[option.name].annotation if option.name in annotations else None
        kind, *notes = get_args(annotation) or (None,)
        long = [name.removeprefix("--") for name in option.opts if name.startswith("--")]
        for info in notes:
            if isinstance(info, OptionInfo) and not info.is_eager:
                found[long[0]] = option.name, kind, info
            elif isinstance(info, ArgumentInfo) and not option.required:
                found[option.name] = option.name, kind, info
    return found


def _checked(value: Any, kind: Any, info: ArgumentInfo | OptionInfo) -> Any:
    """A value as typer takes it; raises ValueError where it is of another kind, or out of range."""
    choices = [each for each in get_args(kind) if each is not NoneType]
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"must be a list, got {value!r:.80}")
        return [_checked(each, choices[0], info) for each in value]
    if choices:  # of a type and None
        return _checked(value, choices[0], info)
    if issubclass(kind, Enum):
        names = [each.value for each in kind]
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {value!r:.80}")
        return value
    # 1 is a number, and a text of one digit; true is neither.
    takes = {float: (int, float), str: (str, int)}.get(kind, (kind,))
    if not isinstance(value, takes) or (isinstance(value, bool) and kind is not bool):
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        raise ValueError(f"must be {names[kind]}, got {value!r:.80}")
    low, high = info.min, info.max
    if (low is not None and value < low) or (high is not None and value > high):
        limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ValueError(f"must be {' and '.join(limits)}, got {value}")
    return kind(value)
