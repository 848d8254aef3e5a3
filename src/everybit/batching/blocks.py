"""KV blocks: free, held by sequences, or cached because they hold the beginning of a text that may come again.

A cached beginning is a path in a tree whose edges are the tokens of one block. It belongs to a tenant and to the
precision that wrote it, so that neither another tenant nor another precision ever reads it. (The tree of prefixes is
RadixAttention's idea, Zheng et al. 2024; whole blocks as edges are vLLM's.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from everybit.errors import EverybitError

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    """One cached block. The root of a (tenant, precision) has none, and its `holders` are the open paths."""

    parent: Node | None
    tokens: Tokens
    block: int
    holders: int = 0  # sequences whose path goes through it
    children: dict[Tokens, Node] = field(default_factory=dict)


class Blocks:
    """`total` blocks of `size` tokens. Every block is free, held or cached: `check` counts them."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self._free = list(range(total - 1, -1, -1))
        self._roots: dict[Hashable, Node] = {}
        self._keys: dict[Node, Hashable] = {}  # of the roots
        # Nodes that nobody holds, the longest unused first. A node comes before its parent, which is let go after it.
        self._unused: OrderedDict[Node, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that `take` could give: free ones, and cached ones that nobody holds."""
        return len(self._free) + len(self._unused)

    @property
    def cached(self) -> int:
        return len(self._unused)

    def path(self) -> Path:
        """For a new sequence."""
        return Path(self)

    def take(self) -> int | None:
        """A block for new tokens; the cached one that was not used for longest where none is free."""
        if self._free:
            return self._free.pop()
        if not self._unused:
            return None
        node, _ = self._unused.popitem(last=False)
        assert node.parent is not None
        del node.parent.children[node.tokens]
        self._forget(node.parent)
        return node.block

    def give(self, block: int) -> None:
        self._free.append(block)

    def root(self, key: Hashable) -> Node:
        """To begin a path at, until `leave_root`."""
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = Node(None, (), -1)
            self._keys[root] = key
        root.holders += 1
        return root

    def leave_root(self, root: Node) -> None:
        root.holders -= 1
        self._forget(root)

    def _forget(self, node: Node) -> None:
        """A root that leads nowhere and that nobody uses."""
        if node.parent is None and not node.children and not node.holders:
            self._roots.pop(self._keys.pop(node), None)

    def hold(self, node: Node) -> None:
        if node.holders == 0:
            del self._unused[node]
        node.holders += 1

    def let_go(self, node: Node) -> None:
        node.holders -= 1
        if node.holders == 0:
            self._unused[node] = None

    def check(self, paths: Sequence[Path]) -> None:
        """That every block is in one place, given the paths of all sequences. Raises: EverybitError"""
        places = list(self._free) + [node.block for node in self._unused]
        held = {node: 0 for path in paths for node in path.nodes}
        for path in paths:
            places += path.own
            for node in path.nodes:
                held[node] += 1
        places += [node.block for node in held]
        counts = {node: node.holders for node in held}
        if sorted(places) != list(range(self.total)) or counts != held or any(n.holders for n in self._unused):
            raise EverybitError(
                f"{len(self._free)} free, {len(self._unused)} cached and {len(places)} blocks in all places arrived, "
                f"expected each of {self.total} in one: the scheduler lost count"
            )


class Path:
    """The blocks of one sequence: first those it shares in the tree, then its own."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._root: Node | None = None
        self.nodes: list[Node] = []
        self.own: list[int] = []
        self._room = 0  # tokens of all
        self._all: tuple[int, ...] | None = ()  # None where it is to be made anew

    @property
    def all(self) -> tuple[int, ...]:
        if self._all is None:
            self._all = (*(node.block for node in self.nodes), *self.own)
        return self._all

    def __len__(self) -> int:
        return len(self.nodes) + len(self.own)

    def open(self, key: Hashable, tokens: Sequence[int]) -> int:
        """Begin with what is cached of `tokens` under `key`, never all of them. Returns how many tokens that is."""
        size = self._blocks.size
        self._root, self._all = self._blocks.root(key), None
        while (node := self._child(tokens)) is not None and (len(self.nodes) + 1) * size < len(tokens):
            self._blocks.hold(node)
            self.nodes.append(node)
        self._room = len(self.nodes) * size
        return self._room

    def grow(self, tokens: int) -> bool:
        """Room for so many tokens in all, if there are blocks; what was taken stays in either case."""
        if self._room >= tokens:
            return True
        before = len(self.own)
        while self._room < tokens and (block := self._blocks.take()) is not None:
            self.own.append(block)
            self._room += self._blocks.size
        if self._all is not None:
            self._all += tuple(self.own[before:])
        return self._room >= tokens

    def share(self, tokens: Sequence[int], count: int) -> None:
        """The blocks that the first `count` tokens fill become part of the tree, or give way to one that is there."""
        if self._root is None:
            return
        while (len(self.nodes) + 1) * self._blocks.size <= count:
            mine, edge = self.own.pop(0), self._edge(tokens)
            parent = self.nodes[-1] if self.nodes else self._root
            node = parent.children.get(edge)
            if node is None:
                node = parent.children[edge] = Node(parent, edge, mine, holders=1)
            else:
                self._blocks.hold(node)
                self._blocks.give(mine)
                self._all = None
            self.nodes.append(node)

    def close(self) -> None:
        """Lets everything go: the tree's blocks stay cached until others need them."""
        for block in self.own:
            self._blocks.give(block)
        for node in reversed(self.nodes):
            self._blocks.let_go(node)
        if self._root is not None:
            self._blocks.leave_root(self._root)
        self.own, self.nodes, self._root, self._room, self._all = [], [], None, 0, ()

    def _edge(self, tokens: Sequence[int]) -> Tokens:
        start = len(self.nodes) * self._blocks.size
        return tuple(tokens[start : start + self._blocks.size])

    def _child(self, tokens: Sequence[int]) -> Node | None:
        parent = self.nodes[-1] if self.nodes else self._root
        assert parent is not None
        return parent.children.get(self._edge(tokens))
