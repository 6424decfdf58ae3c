"""Undo: changes of a model that can be taken back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Undo = Callable[[], Any]
"""Takes one change of a model back. Never a closure: a deep copy of a model must undo its own."""


@dataclass
class Restore:
    """Undoes `put`."""

    module: nn.Module
    name: str
    had: bool
    old: Any

    def __call__(self) -> None:
        """Puts the old value back."""
        if self.had:
            self.module.__dict__[self.name] = self.old
        else:
            del self.module.__dict__[self.name]


def put(undo: list[Undo], module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute of one module, past nn.Module's own bookkeeping, and notes the undo."""
    undo.append(Restore(module, name, name in module.__dict__, module.__dict__.get(name)))
    module.__dict__[name] = value
