"""Which layer gets which scheme: the targets of a modifier against the layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qjax.compress.modifiers import Modifier, QuantizationMixin
from qjax.errors import CheckpointError, RecipeError, nearest
from qjax.formats.compressed_tensors import layer_class
from qjax.scheme import QuantizationScheme, matches

HEAD = "lm_head"
ROUTERS = ("gate", "router")


def assign_all(
    modifiers: Iterable[Modifier],
    modules: Mapping[str, Sequence[int]],
    others: Sequence[str] = (),
) -> list[dict[str, QuantizationScheme]]:
    """`assign` for each modifier of a recipe, nothing for those that do not quantize.

    Raises:
      RecipeError: see `assign`; or two modifiers claim the same layer.
    """
    claims: list[dict[str, QuantizationScheme]] = []
    owner: dict[str, str] = {}
    for modifier in modifiers:
        own = isinstance(modifier, QuantizationMixin)
        claims.append(assign(modifier, modules, others) if own else {})
        name = type(modifier).__name__
        twice = next((module for module in claims[-1] if module in owner), None)
        if twice is not None:
            raise RecipeError(
                f"{twice} is claimed by two modifiers, {owner[twice]} and {name}: let one of them "
                "ignore it, or name other targets"
            )
        owner |= dict.fromkeys(claims[-1], name)
    return claims


def assign(
    modifier: QuantizationMixin,
    modules: Mapping[str, Sequence[int]],
    others: Iterable[str] = (),
) -> dict[str, QuantizationScheme]:
    """What each layer becomes, by its name; layers that stay as they are have no entry.

    A full name goes before a pattern, and a pattern before a class of layers. A GGUF type named for
    linear layers goes for embeddings, too. Routers of experts only go by their full name: a class
    or a pattern leaves them as they are.

    Args:
      modules: shape (..., N, K) of each weight that can be quantized, by module name.
      others: names of the model's other modules, which may be ignored.

    Raises:
      RecipeError: a target or an entry of `ignore` matches nothing, two groups claim a layer, a
        group size does not divide a layer's inputs, or all layers are ignored.
    """
    if not modifier.schemes:
        return {}
    others = [*others, HEAD]  # a head may share the embedding's weight
    _check_targets(modifier, modules, others)
    found = {}
    for module, shape in modules.items():
        if any(_rank(module, target) for target in modifier.ignore):
            continue
        named = any(module in scheme.targets for scheme in modifier.schemes)
        scheme = _scheme(module, modifier.schemes)
        if scheme is None or (module.rpartition(".")[2] in ROUTERS and not named):
            continue
        if not modifier.bypass_divisibility_checks:
            _check_group(module, shape[-1], scheme)
        if scheme.weights is not None or scheme.ggml is not None:
            found[module] = scheme
    unquantized = all(s.weights is None and s.ggml is None for s in modifier.schemes)
    if not found and not unquantized:
        raise RecipeError("nothing is left to quantize: all that targets name is ignored")
    return found


def _rank(module: str, target: str, ggml: bool = False) -> int:
    """How well a target names a module; all experts of a layer go by the name of the first, too."""
    kind = "Linear" if ggml else layer_class(module)
    try:
        one = module.replace(".experts.", ".experts.0.")
        return max(matches(module, target, kind), matches(one, target, kind))
    except CheckpointError as error:  # no regular expression
        raise RecipeError(str(error)) from error


def _scheme(module: str, schemes: Iterable[QuantizationScheme]) -> QuantizationScheme | None:
    ranks = [
        (max(_rank(module, target, scheme.ggml is not None) for target in scheme.targets), scheme)
        for scheme in schemes
    ]
    best = max(rank for rank, _ in ranks)
    claims = [scheme for rank, scheme in ranks if rank == best > 0]
    for scheme in claims[1:]:
        if (scheme.weights, scheme.input_activations, scheme.ggml) != (
            claims[0].weights,
            claims[0].input_activations,
            claims[0].ggml,
        ):
            raise RecipeError(
                f"{module} is named by two groups that differ, by the targets "
                f"{', '.join(claims[0].targets)} and by {', '.join(scheme.targets)}"
            )
    return claims[0] if claims else None


def _check_targets(
    modifier: QuantizationMixin, modules: Iterable[str], others: Sequence[str]
) -> None:
    names = [*modules]
    for scheme in modifier.schemes:
        for target in scheme.targets:
            ggml = scheme.ggml is not None
            if any(_rank(name, target, ggml) for name in names):
                continue
            kinds = sorted({layer_class(name) for name in names})
            other = next((name for name in others if name not in names and name == target), None)
            raise RecipeError(
                f"target {target!r:.120} matches no layer that can be quantized"
                + (f": {other} is none" if other else nearest(target, [*kinds, *names]))
                + f"; layers are named like {_example(names)}, and classes are {', '.join(kinds)}"
            )
    for target in modifier.ignore:
        if not any(_rank(name, target) for name in (*names, *others)):
            raise RecipeError(
                f"ignore: {target!r:.120} matches nothing in this model"
                f"{nearest(target, [*names, *others])}; layers are named like {_example(names)}"
            )


def _example(names: Sequence[str]) -> str:
    return next((name for name in names if "layers" in name), next(iter(names), "(none)"))


def _check_group(module: str, columns: int, scheme: QuantizationScheme) -> None:
    """Groups of columns must divide a layer's inputs; one that holds them all always does."""
    args = scheme.weights
    size = args.group_size if args is not None else None
    if size is None or columns < size or columns % size == 0:
        return
    sizes = [n for n in range(8, columns + 1, 8) if columns % n == 0]
    raise RecipeError(
        f"{module}: groups of {size} do not divide its {columns} inputs; these do: "
        f"{', '.join(map(str, sizes)) or f'only {columns}'} (or ignore it, or give "
        "bypass_divisibility_checks)"
    )
