"""Recipes: which modifiers a model goes through, in the schema of LLM Compressor.

    quant_stage:
      quant_modifiers:
        GPTQModifier:
          targets: [Linear]
          scheme: W4A16
          ignore: [lm_head]

Names of stages and of groups of modifiers mean nothing but their order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qjax.checkpoint import strict_yaml
from qjax.compress.modifiers import (
    MODIFIERS,
    REFUSED,
    RENAMED,
    AWQModifier,
    Modifier,
    QuantizationMixin,
    QuantizationModifier,
)
from qjax.compress.presets import GGML, PRESETS
from qjax.errors import RecipeError, UnsupportedError, nearest
from qjax.registry import load_plugins

# What LLM Compressor writes down of a modifier beside its settings, and settings of its earlier
# versions that only say how it ran.
_RECORDS = {
    *("group", "index", "requires_calibration_data", "initialized_", "finalized_"),
    *("started_", "ended_", "sequential_update", "sequential_targets", "offload_hessians"),
}
_SCHEDULE = ("start", "end", "update")  # of training
_WITHIN = re.compile(r".*_stage(_\d+)?|(.*_)?modifiers")


def parse(recipe: Any) -> tuple[Modifier, ...]:
    """The modifiers of a recipe, in their order.

    Args:
      recipe: YAML or JSON text, the path of a file of it (of Markdown: its front matter), the same
        as a dict, a modifier, or a list of any of these.

    Raises:
      RecipeError: it cannot be read; a key or a setting is wrong, which the message names.
      UnsupportedError: it asks for something that qjax does not do.
    """
    found = tuple(_settled(_modifiers(recipe)))
    if not found:
        raise RecipeError("the recipe has no modifiers")
    for i, modifier in enumerate(found):
        if isinstance(modifier, AWQModifier) and not any(
            isinstance(later, QuantizationMixin) and later.schemes for later in found[i + 1 :]
        ):
            raise RecipeError(
                "AWQModifier scales weights for the scheme of a modifier after it, and there is "
                "none: add a QuantizationModifier"
            )
    return found


def _modifiers(recipe: Any) -> Iterator[Modifier]:
    if isinstance(recipe, tuple(MODIFIERS.values())):
        yield recipe
    elif isinstance(recipe, Mapping):
        yield from _within(recipe, "recipe: ")
    elif isinstance(recipe, os.PathLike) or (isinstance(recipe, str) and _is_file(recipe)):
        path = Path(recipe)
        yield from _within(_load(_read(path), str(path)), f"{path}: ")
    elif isinstance(recipe, str):
        yield from _within(_load(recipe, "recipe"), "recipe: ")
    elif isinstance(recipe, Sequence):
        for each in recipe:
            yield from _modifiers(each)
    else:
        raise RecipeError(f"a recipe is no {type(recipe).__name__}: give YAML, a path or modifiers")


_OWN = tuple(field.name for field in fields(QuantizationMixin))


def _settled(modifiers: Iterable[Modifier]) -> list[Modifier]:
    """Modifiers that each say for themselves what they quantize.

    An AWQModifier that quantizes, too, becomes the two that it stands for. One that says nothing of
    what it quantizes (GPTQ, say) takes over the schemes of the QuantizationModifier before it.
    """
    found: list[Modifier] = []
    for modifier in modifiers:
        if not isinstance(modifier, QuantizationMixin):
            found.append(modifier)
        elif isinstance(modifier, AWQModifier):
            settings = {f.name: getattr(modifier, f.name) for f in fields(modifier)}
            found.append(AWQModifier(**{k: v for k, v in settings.items() if k not in _OWN}))
            if modifier.quantizes:
                found.append(QuantizationModifier(**{name: settings[name] for name in _OWN}))
        elif modifier.schemes or modifier.kv_cache_scheme is not None:
            found.append(modifier)
        else:
            before = [m for m in found if type(m) is QuantizationModifier and m.schemes]
            if isinstance(modifier, QuantizationModifier) or not before:
                raise RecipeError(
                    f"{type(modifier).__name__} does not say what to quantize to: give scheme or "
                    "config_groups"
                )
            found.remove(before[-1])
            found.append(replace(modifier, **{name: getattr(before[-1], name) for name in _OWN}))
    return found


def _is_file(text: str) -> bool:
    if "\n" in text or re.search(r":(\s|$)", text) or text.lstrip().startswith("{"):
        return False
    if not os.path.isfile(text):
        hint = nearest(text, (*PRESETS, *GGML))
        raise RecipeError(f"no such recipe file, nor scheme: {text!r:.200}{hint}")
    return True


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    if path.suffix.lower() != ".md":
        return text
    front = re.match(r"\s*(---|\+\+\+)\n(.*?)\n\1", text, re.DOTALL)
    if front is None:
        raise RecipeError(f"{path} does not begin with a recipe between lines of ---")
    return front[2]


def _load(text: str, where: str) -> Mapping[str, Any]:
    try:
        found = strict_yaml.parse(text)
    except ValueError as error:
        raise RecipeError(f"{where} {error}") from error
    if not isinstance(found, Mapping):
        raise RecipeError(f"{where} holds no stages of modifiers, but {found!r:.80}")
    return found


def _within(node: Any, where: str) -> Iterator[Modifier]:
    """The modifiers of a recipe, a stage, or a group of modifiers; `where` goes before keys."""
    if isinstance(node, list):
        for entry in node:
            yield from _within(entry, where)
        return
    if not isinstance(node, Mapping):
        raise RecipeError(f"{where[:-1]} {node!r:.80} is no dict of modifiers")
    for key, value in node.items():
        name = str(key)
        place = where + name
        if _WITHIN.fullmatch(name):
            yield from _within(value, f"{place}.")
        elif name == "run_type":
            if value != "oneshot":
                raise UnsupportedError(f"{place} {value!r:.80}: qjax quantizes trained models")
        elif name in ("args", "version"):
            if name == "args" and value:
                raise UnsupportedError(f"{place}: variables of recipes are not evaluated")
        else:
            yield _modifier(name, value, place)


def _modifier(name: str, values: Any, where: str) -> Modifier:
    if name in REFUSED:
        raise UnsupportedError(f"{where}: {REFUSED[name]}")
    name, settings = RENAMED.get(name, (name, {}))
    if name not in MODIFIERS:
        load_plugins()
    if name not in MODIFIERS:
        raise RecipeError(
            f"{where}: no such modifier{nearest(name, MODIFIERS)}; known are {', '.join(MODIFIERS)}"
        )
    kind = MODIFIERS[name]
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where}: {values!r:.80} is no dict of settings")
    values = settings | {key: value for key, value in values.items() if key not in _RECORDS}
    for key in _SCHEDULE:
        if values.pop(key, None) not in (None, 0, -1):
            raise UnsupportedError(f"{where}: {key} is for training; leave it out")
    if issubclass(kind, QuantizationMixin):
        values = _grouped(values)
    known = [field.name for field in fields(kind) if field.init]
    for key in values:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {key!r:.80}{nearest(str(key), known)}; known are "
                f"{', '.join(known)}"
            )
    try:
        return kind(**values)
    except (RecipeError, UnsupportedError) as error:
        raise type(error)(f"{where}: {error}") from error


def _grouped(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a scheme that stand beside the modifier's own, as its `scheme`."""
    names = ("weights", "input_activations", "output_activations")
    scheme = {name: values[name] for name in names if name in values}
    if not scheme or "scheme" in values or "config_groups" in values:
        return values
    return {k: v for k, v in values.items() if k not in scheme} | {"scheme": scheme}
