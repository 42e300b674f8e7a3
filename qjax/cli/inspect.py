"""`qjax inspect`: what a model is, and what it takes to run it."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qjax.checkpoint.inspect import Cache, Quantized, Summary

CONTEXTS = (2048, 8192, 32768, 131072)


def inspect(
    source: Annotated[
        str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
    ],
) -> None:
    """Show a model's kind, tensors by type, bits per weight and memory plan."""
    from qjax.checkpoint.inspect import summarize

    typer.echo("\n".join(report(summarize(source))))


def report(found: "Summary") -> list[str]:
    """The lines to print."""
    lines = [
        f"source        {found.source.path}",
        f"architecture  {found.architecture or 'unknown'}",
        f"license       {found.license or 'unknown'}",
        f"parameters    {found.parameters:,}, {found.bits_per_weight:.2f} bits each",
        "",
        f"{'type':<10}{'tensors':>8}{'elements':>16}{'MB':>10}",
    ]
    for use in found.types:
        mb = use.nbytes / 1e6
        lines.append(f"{use.qtype:<10}{use.tensors:>8}{use.elements:>16,}{mb:>10.1f}")
    if found.quantized is not None:
        lines += ["", *_quantized(found.quantized)]
    same = ", as they are in the file" if found.memory == found.nbytes else ""
    lines += ["", f"weights       {found.memory / 1e6:,.1f} MB in memory{same}"]
    if found.cache is not None and found.context_length:
        lines += _cache(found.cache, found.context_length)
    if found.free_memory is not None:
        fits = found.tokens_that_fit
        room = "" if fits is None else f": room for {fits:,} tokens beside the weights"
        lines.append(f"free memory   {found.free_memory / 1e6:,.0f} MB{room}")
    if found.problem:
        lines.append(f"\nqjax cannot run it: {found.problem}")
    return lines


def _cache(found: "Cache", context_length: int) -> list[str]:
    """What the cache holds unless asked otherwise, its size at some lengths, and other dtypes."""
    scales = "scales of its own" if found.scales == 1 else f"{found.scales} scales of its own"
    origin = f"each layer has {scales}" if found.scales else "the model brings no scales"
    auto = found.bytes_per_token[found.auto]
    lines = [f"cache         {auto / 1e3:.1f} KB a token, in {found.auto}: {origin}"]
    shorter = [tokens for tokens in CONTEXTS if tokens < context_length]
    for tokens in [*shorter, context_length]:
        lines.append(f"{'':14}{tokens * auto / 1e6:,.0f} MB for {tokens:,} tokens")
    others = {dtype: size for dtype, size in found.bytes_per_token.items() if dtype != found.auto}
    told = ", ".join(f"{dtype} {size / 1e3:.1f}" for dtype, size in others.items())
    return [*lines, f"{'':14}KB a token if asked for: {told}"]


def _quantized(found: "Quantized") -> list[str]:
    """Method and settings, and what would run each kind of layer."""
    settings = ", ".join(
        f"{key} {value}"
        for key, value in found.settings.items()
        if key != "quant_method" and isinstance(value, str | int | float)
    )
    lines = [f"method        {found.method}"]
    if found.settings:
        lines.append(f"settings      {settings or 'see its config'}")
    lines += [
        "",
        f"{'weights':<12}{'group':<12}{'inputs':<10}{'layers':>7}{'MB':>10}  {'kernel':<8} of",
    ]
    for kind in found.kinds:
        group = "x".join(map(str, kind.group)) if kind.group else "blocks"
        lines.append(
            f"{kind.qtype:<12}{group:<12}{kind.activation or '-':<10}{kind.layers:>7}"
            f"{kind.nbytes / 1e6:>10.2f}  {kind.kernel:<8} {kind.role}"
        )
        lines += [f"{'':14}not {name}: {why}" for name, why in kind.refused.items()]
    return lines


command = inspect
