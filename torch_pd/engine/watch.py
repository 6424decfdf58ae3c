"""Watch: what was done to a model's weights between two calls."""

from typing import TYPE_CHECKING

from torch_pd.nn.linear import in_rows
from torch_pd.nn.patched import patch_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Watch:
    """Sees what the caller has done to a patched model, such as new weights.

    What goes through ``.data`` into a Parameter's own memory leaves no trace, and is not seen.
    """

    def __init__(self, model: "PreTrainedModel"):
        self._model = model
        self._dtype = model.dtype
        self._places: list[int] = []
        self._versions: list[int] = []
        self.changed(captured=False)

    def changed(self, captured: bool) -> bool:
        """Whether the weights are others than at the last look.

        Args:
            captured: graphs read them where they were.

        Raises:
            ValueError: the model cannot go on as it is now; says what was done.
        """
        model = self._model
        patch_state(model).follow(model)
        if model.dtype != self._dtype:
            raise ValueError(
                f"the model was made {model.dtype}, but its KV pages are for {self._dtype}: make a "
                "new LLM after such a change"
            )
        parameters = list(model.parameters())
        places = [p.data_ptr() if in_rows(p) else id(p) for p in parameters]
        versions = [0 if p.is_inference() else p._version for p in parameters]
        if captured and places != self._places:
            raise ValueError(
                "parameters of the model have other storage than CUDA graphs read: copy new values "
                "into them (load_state_dict does), or make a new LLM after such a change"
            )
        same = (places, versions) == (self._places, self._versions)
        self._places, self._versions = places, versions
        return not same
