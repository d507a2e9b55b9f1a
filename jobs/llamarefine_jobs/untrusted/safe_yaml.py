"""Read YAML as plain values: no tag creates an object, and aliases cannot expand beyond a limit."""

from collections.abc import Hashable
from typing import Any

import yaml

LIMIT_BYTES = 1 << 20
_LIMIT_VALUES = 50_000  # with every alias expanded; a recipe has about a hundred
_LONGEST_NUMBER = 400  # digits and more: YAML 1.1 reads 1:59:59:… as one number, in quadratic time


def load(text: str) -> Any:
    """Return the value of one YAML document. Raises a one-line ValueError if it is not plain YAML or exceeds a limit.

    A key that occurs twice in one mapping is an error, too; PyYAML would silently keep the later value.
    """
    if len(text) > LIMIT_BYTES:
        raise ValueError(f"more than {LIMIT_BYTES} bytes")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 a SafeLoader
    except Exception as error:  # for some texts PyYAML raises TypeError, AttributeError and others
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    """Counts the values of the node tree before constructing them: a few lines of aliases can expand to billions."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count(node, {}) > _LIMIT_VALUES:
            raise ValueError(f"more than {_LIMIT_VALUES} values with all aliases expanded")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"`{key.value}` is here twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values `node` expands to. Raises ValueError if it contains itself or too long a number."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value)} characters")
        return 1
    if id(node) not in known:
        known[id(node)] = 0  # the count has begun: if the node occurs again now, it contains itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    elif known[id(node)] == 0:
        raise ValueError("an alias of something inside itself")
    return known[id(node)]
