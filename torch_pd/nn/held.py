"""Held: what the fused blocks of a model hold on to, and whether the model still has it."""

from operator import is_

from torch import nn

from torch_pd.nn.block import ForeignMLP, FusedBlock
from torch_pd.nn.linear import MergedLinear
from torch_pd.nn.recognise import foreign_hooks


class Held:
    """The modules inside fused layers, and the storage of their merged matrices.

    A plain call asks at every token whether the model still has them. So only what may have changed
    is looked at, in lists: 50 us for 36 layers, where a walk over the modules takes 700 us.
    """

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._parents: list[nn.Module] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._bypassed: list[nn.Module] = []
        self._hooks: list[dict] = []
        # As of the last `mend`.
        self._blocks: list[FusedBlock] = []
        self._merges = 0
        self._places: list[tuple[dict, str]] = []
        self._addresses: list[int] = []

    def add(self, layer: nn.Module) -> None:
        """A layer that has become a fused block."""
        self._layers.append(layer)
        for module in layer.modules():
            if module._modules:
                self._parents.append(module)
                self._children.append(dict(module._modules))
        mlp = layer.__dict__["_torch_pd"].mlp
        called = {layer, *(mlp.module.modules() if isinstance(mlp, ForeignMLP) else ())}
        for module in layer.modules():
            if module not in called:
                self._bypassed += [module, module]
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]

    def hooked(self) -> nn.Module | None:
        """A module with a hook that is not called, since the module is not, if there is."""
        if not any(self._hooks):
            return None
        for module, hooks in zip(self._bypassed, self._hooks, strict=True):
            if hooks and foreign_hooks(hooks):
                return module
        return None

    def replaced(self) -> tuple[nn.Module, str] | None:
        """A parent and the name of a module in it that is another than at first, if there is."""
        # Modules are equal if they are the same one.
        if [parent._modules for parent in self._parents] == self._children:
            return None
        for parent, children in zip(self._parents, self._children, strict=True):
            for name, module in children.items():
                if parent._modules.get(name) is not module:
                    return parent, name
        return None  # some were added

    def mend(self) -> None:
        """Merges again what linears hold elsewhere than in their merged matrix."""
        blocks = [layer.__dict__["_torch_pd"] for layer in self._layers]
        if (
            len(blocks) == len(self._blocks)
            and all(map(is_, blocks, self._blocks))
            and self._merges == MergedLinear.merges
            and self._addresses == self._look()
        ):
            return
        self._blocks = blocks
        matrices = [merged for fused in blocks for merged in fused.merged()]
        for merged in matrices:
            merged.mend()
        self._merges = MergedLinear.merges
        self._places = [place for merged in matrices for place in merged.places()]
        self._addresses = self._look()

    def _look(self) -> list[int]:
        return [
            0 if (tensor := at.get(name)) is None else tensor.data_ptr()
            for at, name in self._places
        ]
