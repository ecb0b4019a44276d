"""Beginnings of node names, by which passes recognise the nodes that passes have added."""

import onnx_graphsurgeon as gs

REGISTERS = "regcache.registers"
"""Begins the name of every node that a register pass adds, and of each constant it replaces."""

KEYS_AND_VALUES = f"{REGISTERS}/kv/"
TOKENS = f"{REGISTERS}/token/"
DELETED = f"{REGISTERS}/delete/"
BOUNDED = f"{REGISTERS}/bound"
MOVED = f"{REGISTERS}/move/"

ROTATION = "regcache.rotation"
"""Begins the name of every node that a rotation pass adds."""


def of_registers(name: str) -> bool:
    """Whether a register pass gave this name."""
    return name.startswith(REGISTERS)


def rotates(node: gs.Node | None) -> bool:
    """Whether a rotation pass put the node there."""
    return node is not None and str(node.name).startswith(ROTATION)
