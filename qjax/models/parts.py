"""A model that is split over a mesh: each device runs its part inside of a `jax.shard_map`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.kv_cache import Batch, KVCache
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.params import Params
from qjax.sharding import MODEL, Parallel, local, local_config, specs, split_of


@dataclass(frozen=True)
class Parts:
    """How `mesh` splits the model of a config (the whole one); `all_reduce` as in `Parallel`."""

    mesh: Mesh
    whole: ModelConfig
    all_reduce: str = "float32"

    @cached_property
    def parallel(self) -> Parallel:
        return Parallel.of(self.mesh, self.whole, self.all_reduce)

    @cached_property
    def config(self) -> ModelConfig:
        """Of one device's part."""
        return local_config(self.whole, self.parallel)

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """Axes that the vocabulary is split over."""
        return MODEL if self.parallel.vocabulary else None

    def specs(self, tree: Any) -> list[P]:
        """Of each array of the weights, in the order of `jax.tree.leaves`."""
        return jax.tree.leaves(mapped(lambda name, leaf: specs(leaf, self._split(name)), tree))

    def tree(self, whole: Any, leaves: list[jax.Array]) -> Any:
        """The weights of one device from its arrays."""
        return jax.tree.unflatten(
            jax.tree.structure(mapped(lambda _, leaf: local(leaf), whole)), leaves
        )

    def batch(self, batch: Batch) -> Batch:
        """For layers that have to know of other devices."""
        return replace(batch, parallel=self.parallel)

    def placed(self, specs: Any) -> Any:
        """A sharding for each spec."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def cache_specs(self, cache: KVCache) -> Any:
        """Pages by their heads, and so what turns keys."""
        return tuple(
            layer._replace(
                keys=jax.tree.map(lambda _: P(None, MODEL), layer.keys),
                values=jax.tree.map(lambda _: P(None, MODEL), layer.values),
                basis=jax.tree.map(lambda _: P(MODEL), layer.basis),
                seen=jax.tree.map(lambda _: P(None, MODEL), layer.seen),
            )
            for layer in cache
        )

    def cache_config(self) -> ModelConfig:
        """For the cache of all devices: with as many heads as they have together."""
        return replace(self.whole, num_kv_heads=self.config.num_kv_heads * self.parallel.size)

    def _split(self, name: str) -> Any:
        return split_of(name, self.whole, self.parallel)


def run(
    params: Params, tokens: jax.Array, batch: Batch, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """`functional.run`, of a split model too; its cache is made with `cache_config`."""
    if params.mesh is None:
        return functional.run(params.config, params.tree, tokens, batch, cache)
    parts = Parts(params.mesh, params.config, params.all_reduce)

    def own(leaves: Any, tokens: jax.Array, batch: Batch, cache: KVCache) -> Any:
        tree = parts.tree(params.tree, leaves)
        return functional.run(parts.config, tree, tokens, parts.batch(batch), cache)

    cached = parts.cache_specs(cache)
    asked = any(layer.seen is not None for layer in cache)
    left = cached if not asked else tuple(x._replace(seen=(P(None, MODEL),) * 2) for x in cached)
    return jax.shard_map(
        own,
        mesh=params.mesh,
        in_specs=(parts.specs(params.tree), P(), P(), cached),
        out_specs=(P(), left),
        check_vma=False,
    )(jax.tree.leaves(params.tree), tokens, batch, cache)


def logits(params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
    """`functional.logits`; of a split vocabulary, each device has its columns."""
    if params.mesh is None:
        return functional.logits(params.config, params.tree, hidden, batch)
    parts = Parts(params.mesh, params.config)

    def own(leaves: Any, hidden: jax.Array, batch: Batch) -> jax.Array:
        tree = parts.tree(params.tree, leaves)
        return functional.logits(parts.config, tree, hidden, parts.batch(batch))

    return jax.shard_map(
        own,
        mesh=params.mesh,
        in_specs=(parts.specs(params.tree), P(), P()),
        out_specs=P(None, parts.vocabulary),
        check_vma=False,
    )(jax.tree.leaves(params.tree), hidden, batch)


def cache_config(params: Params) -> ModelConfig:
    """The config to make this model's cache with."""
    if params.mesh is None:
        return params.config
    return Parts(params.mesh, params.config).cache_config()


def mapped(change: Any, tree: Any, path: tuple[str, ...] = ()) -> Any:
    """The tree with each parameter, by its name, changed."""
    if isinstance(tree, dict):
        return {key: mapped(change, value, (*path, key)) for key, value in tree.items()}
    return change(".".join(path), tree)
