"""YAML, of which only data is read, and each key once."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses keys that come twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r:.80} comes twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """What a YAML document holds.

    Raises ValueError, with the line, where it is none, or a key comes twice.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is no YAML: {error}") from error
