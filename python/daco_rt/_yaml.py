"""Reading what people write in YAML: safe, and strict about keys that come twice."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from daco_rt.errors import DacoError, did_you_mean


def load_yaml(path: Path, error: type[DacoError] = DacoError) -> Any:
    """Return the file's tree of plain values.

    Raises
    ------
    error
        The file cannot be read as YAML, or a key comes twice in one mapping; the sentence names the line.

    Example
    -------
    >>> load_yaml(Path("configs/policies.yaml"))["version"]
    1
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = loader.construct_object(key)
            if name in seen:
                raise error(f"{path}, line {key.start_mark.line + 1}: '{name}' comes twice; remove one")
            seen.add(name)
        loader.flatten_mapping(node)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as trouble:
        raise error(f"{path} cannot be read as YAML: {' '.join(str(trouble).split())}") from trouble


def known_keys(
    tree: Any, keys: Collection[str], where: str, error: type[DacoError] = DacoError
) -> dict[str, Any]:
    """Return a mapping after checking that it is one and has these keys only.

    Raises
    ------
    error
        It is no mapping, or a key is unknown; the nearest known key is named.
    """
    if not isinstance(tree, dict):
        raise error(f"{where}: expected keys and values, got {type(tree).__name__}")
    for key in tree:
        if key not in keys:
            raise error(f"{where}: key '{key}' is unknown{did_you_mean(str(key), keys)}")
    return tree
