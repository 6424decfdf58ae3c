"""Plain calls and ``generate`` of a patched model: padded batches in, packed passes inside."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_pd.kv.cache import PagedCache
from torch_pd.nn.patched import PatchState, run

# Caches that generate may be asked for by name and that pages stand for.
_CACHE_NAMES = (None, "dynamic", "dynamic_full", "hybrid")


@torch.no_grad()
def forward(model: PreTrainedModel, *args, **kwargs) -> Any:
    """Stands in for the forward of a patched model; arguments and output are Hugging Face's.

    Positions default to the count of real tokens before each, as in ``generate``. Logits and hidden
    states of padding are zeros. No gradients.

    Raises:
        ValueError: the model is in training mode, or an argument asks for what KV pages do not do.
    """
    state: PatchState = model.__dict__["_torch_pd"]
    state.follow(model)
    given = _arguments(state, args, kwargs)
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode: call eval(), or torch_pd.unpatch_model "
            "to train it"
        )
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    name, tokens = ("input_ids", ids) if embeds is None else ("inputs_embeds", embeds)
    dims = 2 if embeds is None else 3
    if tokens.dim() != dims:
        want = "[batch, length]" if embeds is None else "[batch, length, width]"
        raise ValueError(f"{name} is {list(tokens.shape)}, expected {want}")
    num_rows, length = tokens.shape[:2]
    labels, keep = given.pop("labels", None), given.pop("logits_to_keep", None)
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    cache, use_cache = given.pop("past_key_values", None), given.pop("use_cache", None)
    switches = {"output_hidden_states": given.pop("output_hidden_states", None)}
    return_dict = given.pop("return_dict", None)
    given.pop("cache_position", None)  # told by the cache
    for key, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{key} does not work on a model patched by torch_pd; torch_pd.unpatch_model "
                "gives the original back"
            )
    if model.config.output_attentions:
        raise ValueError("config.output_attentions: paged attention never makes the weights")
    if use_cache is None:
        use_cache = getattr(model.config, "use_cache", True)
    kept = cache is not None or use_cache
    cache = _check_cache(state, model, cache) or new_cache(state, model)
    columns = _columns(mask, cache, num_rows, length)

    batch, counted = cache.extend(columns)
    try:
        if state.window:
            _check_holes(state.window, cache.columns)
        real = columns.flatten().nonzero()[:, 0]
        rows = torch.full((num_rows, length), -1)
        rows.view(-1)[real] = torch.arange(len(real))
        wanted = _wanted(rows, keep)
        select = wanted[wanted >= 0]
        flat = tokens.reshape(num_rows * length, *tokens.shape[2:])
        if len(real) < len(flat):
            flat = flat[real.to(flat.device)]
        if positions is not None:
            if mask is None and not kept:
                _check_unpacked(positions)
            counted = _check_positions(positions, num_rows, length).flatten()[real.to(flat.device)]
        longest = max(cache.lengths)
        if state.limit is not None and positions is not None:
            longest = max(longest, int(positions.max()) + 1)
        if state.limit is not None and longest > state.limit.length:
            raise ValueError(
                f"a sequence of {longest} tokens is too long for {type(model).__name__} patched by "
                f"torch_pd: {state.limit.reason}"
            )
        output = run(
            state,
            model,
            cache.pool,
            batch,
            counted,
            None if len(select) == len(real) else select.to(flat.device),
            **{name: flat[None]},
            **{key: value for key, value in switches.items() if value is not None},
        )
    except BaseException:
        cache.crop(-length)
        raise
    output.logits = _spread(output.logits[0], wanted)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(_spread(x[0], rows) for x in output.hidden_states)
    if kept:
        output.past_key_values = cache
    if labels is not None:
        vocab = model.config.get_text_config().vocab_size
        output.loss = model.loss_function(logits=output.logits, labels=labels, vocab_size=vocab)
        output.move_to_end("loss", last=False)
    if return_dict is False or (return_dict is None and not model.config.return_dict):
        return output.to_tuple()
    return output


def prepare_cache(
    model: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands in for ``_prepare_cache_for_generation``: puts a PagedCache into ``model_kwargs``.

    Raises:
        ValueError: another kind of cache is asked for.
    """
    state: PatchState = model.__dict__["_torch_pd"]
    cache = _check_cache(state, model, model_kwargs.get("past_key_values"))
    if generation_config.cache_implementation not in _CACHE_NAMES:
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r}: a model patched by "
            "torch_pd keeps its keys and values in pages; leave it out"
        )
    if cache is not None:
        cache._is_user_defined = True
    elif generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = new_cache(state, model)


def new_cache(state: PatchState, model: PreTrainedModel) -> PagedCache:
    """An empty cache for the model."""
    return PagedCache(state.shape(), state.kv_dtype(), model.device)


def _arguments(state: PatchState, args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments by name."""
    bound = state.signature.bind(*args, **kwargs).arguments
    for parameter in state.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return dict(bound)


def _check_cache(state: PatchState, model: PreTrainedModel, cache: Any) -> PagedCache | None:
    if cache is None:
        return None
    if not isinstance(cache, PagedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; a model patched by torch_pd keeps its "
            "keys and values in pages: leave it out, or pass what an earlier call returned"
        )
    want = (state.shape(cache.shape.block_size), state.kv_dtype(), model.device)
    if (cache.shape, cache.dtype, cache.device) != want:
        raise ValueError(
            f"past_key_values holds {cache.shape.describe()} in {cache.dtype} on {cache.device}, "
            f"this model needs {want[0].describe()} in {want[1]} on {want[2]}"
        )
    return cache


def _columns(mask: Any, cache: PagedCache, num_rows: int, length: int) -> Tensor:
    """bool [num_rows, length] on CPU: which of the new columns are real tokens."""
    seen = cache.get_seq_length()
    if mask is None:
        return torch.ones(num_rows, length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {what}; pages take 2-D masks [batch, length] of 0 and 1 only"
        )
    if mask.shape != (num_rows, seen + length):
        hint = ""
        if not seen and mask.shape[1] > length:
            # Phi3 does so in generate where its rotation may change, and has lost them then.
            hint = "; if the model has dropped its cache, the tokens before are lost"
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, expected {[num_rows, seen + length]}: "
            f"{seen} columns in past_key_values and {length} new ones{hint}"
        )
    mask = mask.to("cpu", torch.bool)
    if seen and not torch.equal(mask[:, :seen], cache.columns):
        raise ValueError(
            "attention_mask differs from the one that the columns in past_key_values were stored "
            "with; padding takes no place in pages, so it cannot change later"
        )
    return mask[:, seen:]


def _check_holes(window: int, columns: Tensor) -> None:
    """ValueError for padding between the tokens of a sequence longer than a sliding window:
    transformers' windows are of columns, those over pages are of tokens."""
    if bool(columns.all()):
        return
    count, length = columns.sum(1), columns.shape[1]
    real = columns.int()
    span = length - real.argmax(1) - real.flip(1).argmax(1)
    holes = ((count > 0) & (span != count) & (span > window)).nonzero()[:, 0]
    if len(holes):
        row = int(holes[0])
        raise ValueError(
            f"attention_mask has {int(span[row] - count[row])} columns of padding between the "
            f"tokens of row {row}, over which a sliding window of {window} tokens cannot be laid "
            "as transformers lays it: pad in front of the tokens (generate adds behind them)"
        )


def _check_positions(positions: Tensor, num_rows: int, length: int) -> Tensor:
    if positions.dim() == 3:
        # Of models that see images: time, height and width, which are the same for text.
        if not torch.equal(positions, positions[:1].expand_as(positions)):
            raise ValueError(
                f"position_ids {list(positions.shape)} differ between their axes, as for images: "
                "only text works on a model patched by torch_pd"
            )
        positions = positions[0]
    if positions.dim() != 2 or positions.shape not in ((num_rows, length), (1, length)):
        raise ValueError(
            f"position_ids is {list(positions.shape)}, expected {[num_rows, length]} or "
            f"{[1, length]}"
        )
    return positions.expand(num_rows, length)


def _check_unpacked(positions: Tensor) -> None:
    """ValueError for positions that transformers takes for several sequences in one row: without a
    mask and a cache it cuts where they do not go up by one."""
    jumps = (positions.diff(dim=-1) != 1).flatten(0, -2).any(-1).nonzero()[:, 0]
    if len(jumps):
        raise ValueError(
            f"position_ids do not go up by one in row {int(jumps[0])}: transformers takes that for "
            "several sequences in one; give each a row of its own, or an attention_mask"
        )


def _wanted(rows: Tensor, keep: int | Tensor | None) -> Tensor:
    """The part [batch, kept columns] of ``rows`` that logits_to_keep asks for."""
    if isinstance(keep, Tensor):
        return rows[:, keep.cpu()]
    return rows[:, -keep:] if keep else rows


def _spread(x: Tensor, rows: Tensor) -> Tensor:
    """``x [n, C]``, the real tokens in order, to ``[*rows.shape, C]`` with zeros for padding."""
    if x.shape[0] == rows.numel():
        return x.view(*rows.shape, -1)
    out = x.new_zeros(rows.numel(), x.shape[-1])
    out[(rows.flatten() >= 0).nonzero()[:, 0].to(x.device)] = x
    return out.view(*rows.shape, -1)


def wrap(original: Any) -> Any:
    """`forward` with the name and the signature of the forward it stands for.

    torch.compile calls it as it is: pages and tables grow from call to call.
    """

    @torch.compiler.disable
    @functools.wraps(original)
    def standing_in(model: PreTrainedModel, *args, **kwargs) -> Any:
        return forward(model, *args, **kwargs)

    return standing_in
