"""Hugging Face transformers on this library's attention: an implementation by name, SWAA, and a cache that forgets.

    import magi_attention.integrations.transformers as swaa

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="magi_attention")
    swaa.enable_swaa(model, swaa.SWAAConfig(sliding_window_size=2048, keep_first=10))
    model.generate(**inputs, past_key_values=swaa.SWAACache(model.config, inputs["attention_mask"]))

Importing the module registers the implementation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from magi_attention.api.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from magi_attention.api.flash_attn_kvcache import flash_attn_with_kvcache
from magi_attention.attention import attention
from magi_attention.common.recent import Recent
from magi_attention.errors import check_tensor, check_type, complaint
from magi_attention.integrations.sequences import Ints, Sight, batch_mask, left_padding, stored_columns
from magi_attention.integrations.swaa import SWAAConfig
from magi_attention.mask import Mask

try:
    from transformers import (
        MODEL_MAPPING,
        AttentionInterface,
        AttentionMaskInterface,
        DynamicCache,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise ImportError(
        complaint(
            "transformers", "version 5.23 or newer", error, 'pip install "magi_attention[transformers]"'
        )
    ) from error

__all__ = ["NAME", "SWAACache", "SWAAConfig", "disable_swaa", "enable_swaa", "register"]

NAME = "magi_attention"
"""What ``attn_implementation=`` calls it. Names with "flash" in them are transformers' own."""

_FEW_QUERIES = 16
"""A call without gradients, of at most so many queries to more keys, is a step of decoding."""

_HARMLESS = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)
"""Keywords of models that attention layers hand on, and that mean nothing to attention."""

_MASKS = "transformers.masking_utils"
_OVERLAYS = {
    "causal_mask_function": True,
    "bidirectional_mask_function": False,
    "sliding_window_overlay.<locals>.inner_mask": True,
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": False,
}
"""transformers' masks that need no tensor here, and whether they are causal. Layers name their windows themselves."""

_Found = TypeVar("_Found")
_values: Recent[tuple[torch.Tensor, Any]] = Recent(32)


def register() -> None:
    """Make ``attn_implementation="magi_attention"`` known. Importing the module has done so; again does no harm."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)


def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """What layers get as ``attention_mask``: None, or the number of the sequence that each key belongs to, 0 for padding.

    (batch, n) int32, and the queries stand at the last of the n columns: keys beyond, which a static cache has, are
    nobody's. Called by transformers once a forward, with its own mask as a function of indices.

    Raises:
        NotImplementedError: a mask that is not causal, bidirectional, or one of these in a window, over padding or packed
            sequences; a model that would not call ``attention_forward``, and be without a mask.
    """
    if "config" in others:
        _check_model(others["config"].__class__)
    is_causal, sequences = _reading(mask_function)
    length = int(q_offset) + q_length - kv_offset if is_causal else kv_length
    if sequences is not None:
        return (sequences + 1).to(torch.int32)
    if attention_mask is None:
        if length == kv_length:
            return None
        return torch.ones(batch_size, length, dtype=torch.int32, device=others.get("device"))
    real = attention_mask[:, kv_offset : kv_offset + length]
    check_tensor(
        "attention_mask", real, shape=(batch_size, length), remedy="It covers the cached tokens, too."
    )
    if length == kv_length and bool(real.all()):
        return None
    return real.to(torch.int32)


@functools.cache
def _check_model(kind: type[PreTrainedConfig]) -> None:
    """transformers lets models with layers of their own have any implementation; they would take its masks alone."""
    model = MODEL_MAPPING.get(kind, None)
    for each in model if isinstance(model, tuple) else (model,):
        if each is not None and not each._can_set_attn_implementation():
            remedy = 'Use attn_implementation="eager".'
            expected = "layers that use transformers' AttentionInterface"
            raise NotImplementedError(complaint("model", expected, each.__name__, remedy))


def _reading(function: Callable[..., Any] | None) -> tuple[bool, torch.Tensor | None]:
    """Whether one of transformers' mask functions is causal, and the (batch, n) sequences that it keeps apart."""
    if function is None:
        return True, None
    name = function.__qualname__ if function.__module__ == _MASKS else ""
    if name in _OVERLAYS:
        return _OVERLAYS[name], None
    captured = inspect.getclosurevars(function).nonlocals
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        return False, captured["packed_sequence_mask"]
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _reading(captured["mask_function"])
    if name == "and_masks.<locals>.and_mask":
        parts = [_reading(part) for part in captured["mask_functions"]]
        sequences = [found for _, found in parts if found is not None]
        return any(causal for causal, _ in parts), sequences[0] if sequences else None
    raise NotImplementedError(
        complaint(
            "the model's mask",
            "causal or bidirectional attention, windows, padding or packed sequences",
            f"{function.__module__}.{function.__qualname__}",
            'Use attn_implementation="sdpa" for this model.',
        )
    )


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    deterministic: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer: its ``config`` may say SWAA, ``is_causal`` and ``layer_idx``.
        query: (batch, nheads, sq, headdim). key, value: (batch, nheads_k, sk, headdim).
        attention_mask: of ``attention_mask_of``: (batch, n) int, or None.
        dropout: probability while the module trains. scaling: headdim ** -0.5 when None. softcap: None is off.
        sliding_window: keys in the layer's own window, the query's own among them; as many on the right if not causal.
        s_aux: (nheads,) logits of attention sinks.
        position_ids: (batch or 1, sq). If attention is causal, without a mask, and all keys come with the call, a
            position that is not the next after the one before it begins another sequence.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1,) boundaries of packed sequences, instead.

    Returns:
        (batch, sq, nheads, headdim) and None, where other implementations return attention weights.

    Raises:
        NotImplementedError: a mask of more than two axes, attention weights, or an argument unknown here.
        TypeError, ValueError: arguments that do not fit together.
    """
    _refuse(others)
    sight = _sight(module, is_causal, sliding_window)
    q, k, v = (x.transpose(1, 2) for x in _in_autocast(query, key, value))
    if attention_mask is not None:
        _check_mask(attention_mask, q)
    if softcap is not None and softcap < 0:
        raise ValueError(complaint("softcap", "at least 0, or None", softcap))
    call = _Call(q, k, v, s_aux, sight, scaling, softcap or 0.0, float(dropout) if module.training else 0.0)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        cuts = _boundaries(cu_seq_lens_q, cu_seq_lens_k, attention_mask)
        return call.packed(*cuts, max_length_q, max_length_k, bool(deterministic)), None
    numbers = attention_mask
    if numbers is None and sight.causal:
        numbers = _packing(position_ids, q, k)
    if numbers is not None:
        pads = _pads(numbers, q, k) if call.is_decoding else None
        if pads is not None:
            return call.decoded(pads), None
        return call.masked(_band_mask(numbers, q, k, sight), bool(deterministic)), None
    return call.decoded() if call.is_decoding else call.whole(bool(deterministic)), None


@dataclass(frozen=True)
class _Call:
    """q (b, sq, nheads, headdim), k and v (b, sk, nheads_k, headdim) of one layer, and the ways to attend."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    s_aux: torch.Tensor | None
    sight: Sight
    scale: float | None
    softcap: float
    dropout_p: float

    @property
    def _windowed(self) -> dict[str, Any]:
        return {
            "softmax_scale": self.scale,
            "softcap": self.softcap,
            "s_aux": self.s_aux,
            "causal": self.sight.causal,
            "window_size": self.sight.window,
            "keep_first": self.sight.keep_first,
            "force_fa_decode": self.sight.force_fa_decode,
        }

    @property
    def is_decoding(self) -> bool:
        """On a GPU, a few queries to a cache, without gradients."""
        records = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))
        few = self.q.shape[1] <= _FEW_QUERIES and self.q.shape[1] < self.k.shape[1]
        return self.q.is_cuda and few and not records and self.dropout_p == 0

    def decoded(self, pads: torch.Tensor | None = None) -> torch.Tensor:
        """With ``pads`` keys of padding on the left."""
        out = flash_attn_with_kvcache(self.q, self.k, self.v, cache_leftpad=pads, **self._windowed)
        assert isinstance(out, torch.Tensor)
        return out

    def whole(self, deterministic: bool) -> torch.Tensor:
        """One sequence in each row of the batch."""
        out = flash_attn_func(
            self.q, self.k, self.v, self.dropout_p, deterministic=deterministic, **self._windowed
        )
        assert isinstance(out, torch.Tensor)
        return out

    def packed(
        self,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int | torch.Tensor | None,
        max_seqlen_k: int | torch.Tensor | None,
        deterministic: bool,
    ) -> torch.Tensor:
        """Sequences cut at boundaries, which a GPU is not waited for."""
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        longest_q = len(q) if max_seqlen_q is None else max_seqlen_q
        longest_k = len(k) if max_seqlen_k is None else max_seqlen_k
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, self.dropout_p,
            deterministic=deterministic, **self._windowed,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out.unflatten(0, self.q.shape[:2])

    def masked(self, mask: Mask, deterministic: bool) -> torch.Tensor:
        """With a mask over the rows of the batch, one behind the other."""
        q, k, v = (x.flatten(0, 1) for x in (self.q, self.k, self.v))
        out, _ = attention(
            q,
            k,
            v,
            mask,
            sink=None if self.s_aux is None else self.s_aux[None],
            softmax_scale=self.scale,
            softcap=self.softcap,
            dropout_p=self.dropout_p,
            deterministic=deterministic,
        )
        return out.unflatten(0, self.q.shape[:2])


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        remedy = 'Leave it out, or use attn_implementation="eager".'
        raise NotImplementedError(complaint(name, "None or False", type(value).__name__, remedy))


def _check_mask(attention_mask: torch.Tensor, q: torch.Tensor) -> None:
    if attention_mask.dim() != 2:
        remedy = 'Give the 2-D padding mask, or use attn_implementation="sdpa".'
        got = f"shape {tuple(attention_mask.shape)}"
        raise NotImplementedError(complaint("attention_mask", "(batch, keys), or None", got, remedy))
    if attention_mask.is_floating_point():
        raise TypeError(complaint("attention_mask dtype", "integers or booleans", attention_mask.dtype))
    check_tensor("attention_mask", attention_mask, shape=(len(q), "keys"))


def _in_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the precision that autocast asks for: rotary embeddings leave fp32 queries and keys beside bf16 values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _sight(module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None) -> Sight:
    """What the layer's queries see: the model's own window if it has one, else that of SWAA."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window, keep_first, decode = sliding_window, 0, False
    stored = getattr(getattr(module, "config", None), "swaa_config", None)
    if stored is not None and sliding_window is None:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            remedy = "SWAA needs it to know the layers that do not slide."
            raise NotImplementedError(
                complaint(f"{type(module).__name__}.layer_idx", "an integer", None, remedy)
            )
        swaa = SWAAConfig(**stored)
        if swaa.slides(layer):
            window, keep_first = swaa.sliding_window_size, swaa.keep_first
            decode = swaa.decodes_in_full(layer)
    if window == 0:
        raise ValueError(complaint("sliding_window", "at least 1, or None", window))
    left = -1 if window is None or window < 0 else window - 1
    return Sight(causal, left, 0 if causal else left, keep_first, decode)


def _boundaries(
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError(complaint("cu_seq_lens_q, cu_seq_lens_k", "both", "one"))
    if attention_mask is not None and bool((attention_mask == 0).any()):
        raise ValueError(complaint("attention_mask beside cu_seq_lens_q", "no padding", "padding"))
    return cu_seq_lens_q, cu_seq_lens_k


def _packing(position_ids: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The numbers of packed sequences; None for one sequence a row, or if some of its keys come from a cache."""
    num_rows = q.shape[1]
    if position_ids is None or num_rows == 1 or num_rows != k.shape[1]:
        return None
    if tuple(position_ids.shape) not in (
        (1, num_rows),
        (q.shape[0], num_rows),
    ):  # coordinates of something else
        return None

    def make() -> torch.Tensor | None:
        numbers = 1 + torch.nn.functional.pad(position_ids.diff() != 1, (1, 0)).cumsum(1).to(torch.int32)
        return numbers if bool((numbers[:, -1] > 1).any()) else None

    return _remembered("packing", position_ids, (), make)


def _remembered(what: str, x: torch.Tensor, others: Hashable, make: Callable[[], _Found]) -> _Found:
    """What ``make`` finds in ``x`` and others: every layer gets the same tensor, whose values are read once."""
    key = None if x.is_inference() else (what, id(x), x._version, others)
    found = _values.get(key) if key else None
    if found is None:
        found = x, make()  # holding x keeps its id
        if key:
            _values.put(key, found)
    return found[1]


def _on_host(numbers: torch.Tensor, batch: int) -> Ints:
    """(batch, n) numbers of sequences, for which the host waits."""
    host = _remembered("host", numbers, (), lambda: numbers.cpu().numpy().astype(np.int64))
    return np.broadcast_to(host, (batch, numbers.shape[1]))


def _pads(numbers: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """(batch,) int32 padding on the left of each row, if there is nothing else."""
    batch, num_rows, num_cols = q.shape[0], q.shape[1], k.shape[1]

    def make() -> torch.Tensor | None:
        pads = left_padding(_on_host(numbers, batch), num_rows, num_cols)
        return None if pads is None else torch.from_numpy(pads).to(q.device, torch.int32)

    return _remembered("padding", numbers, (batch, num_rows, num_cols), make)


def _band_mask(numbers: torch.Tensor, q: torch.Tensor, k: torch.Tensor, sight: Sight) -> Mask:
    """The mask of a whole batch."""
    sizes = q.shape[0], q.shape[1], k.shape[1]
    return _remembered("mask", numbers, (*sizes, sight), lambda: _make_band_mask(numbers, *sizes, sight))


def _make_band_mask(numbers: torch.Tensor, batch: int, num_rows: int, num_cols: int, sight: Sight) -> Mask:
    host = _on_host(numbers, batch)
    if host.shape[1] > num_cols:
        stored = stored_columns(host, num_rows, num_cols, sight)
        if stored is None:
            remedy = "Tell a SWAACache the padding on the left: SWAACache(model.config, attention_mask)."
            raise ValueError(
                complaint("keys in the cache", f"{host.shape[1]} like attention_mask", num_cols, remedy)
            )
        host = stored
    if sight.causal and host.shape[1] < num_rows:
        raise ValueError(complaint("attention_mask", f"at least {num_rows} columns", host.shape[1]))
    return batch_mask(host, num_rows, num_cols, sight)


def enable_swaa(model: PreTrainedModel, config: SWAAConfig) -> None:
    """Let a decoder model slide, by ``attn_implementation="magi_attention"`` and a ``swaa_config`` in its config.

    The config is saved with the model, and has its effect on any model with this implementation. Layers that have a
    window of their own keep it. Calling it again changes the recipe; ``disable_swaa`` ends it.

    Raises:
        TypeError: not a transformers model, or not an ``SWAAConfig``.
        ValueError: layers that the model does not have, or a model all of whose layers have windows of their own.
        NotImplementedError: an encoder-decoder, or a model that cannot change its attention.
    """
    check_type("model", model, PreTrainedModel)
    check_type("config", config, SWAAConfig)
    if getattr(model.config, "is_encoder_decoder", False):
        remedy = "Cross-attention has no window."
        raise NotImplementedError(complaint("model", "a decoder", "an encoder-decoder", remedy))
    decoder = model.config.get_text_config(decoder=True)
    config.check_layers(decoder.num_hidden_layers)
    layers = DynamicCache(config=decoder).layers
    if config.sliding_window_size and all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(complaint("model", "a layer with full attention", "its own windows in all layers"))
    before = model.config._attn_implementation
    register()
    model.set_attn_implementation(NAME)
    if decoder._attn_implementation != NAME:
        remedy = "It does not use transformers' AttentionInterface."
        raise NotImplementedError(
            complaint("model", "attention that can be set", type(model).__name__, remedy)
        )
    if before != NAME:
        model._attention_before_swaa = before
    decoder.swaa_config = config.dict()


def disable_swaa(model: PreTrainedModel) -> None:
    """Undo ``enable_swaa``: full attention, by the implementation that the model had. Does nothing without SWAA.

    Raises:
        TypeError: not a transformers model.
    """
    check_type("model", model, PreTrainedModel)
    decoder = model.config.get_text_config(decoder=True)
    if hasattr(decoder, "swaa_config"):
        del decoder.swaa_config
    if hasattr(model, "_attention_before_swaa"):
        model.set_attn_implementation(model._attention_before_swaa)
        del model._attention_before_swaa


class SWAACache(DynamicCache):
    """A cache for ``past_key_values=`` that drops what no later query will see: behind the window, after the kept keys.

    A layer that slides, and does not decode in full, holds at most ``keep_first + sliding_window_size - 1`` keys (and the
    padding of the longest left padding) between calls. Other layers hold what they would in a ``DynamicCache``. Positions
    stay true ones: ``get_seq_length`` counts the tokens seen. Beam search reorders it; it cannot be cropped once it
    has dropped something.

    Args:
        config: ``model.config`` of a model with ``enable_swaa``.
        attention_mask: (batch, prompt) of the prompt, nonzero for tokens: needed if it is padded on the left, because
            ``keep_first`` counts from the first token that is no padding.

    Raises:
        ValueError: a config without SWAA. NotImplementedError: layers that share keys.
    """

    def __init__(self, config: PreTrainedConfig, attention_mask: torch.Tensor | None = None) -> None:
        check_type("config", config, PreTrainedConfig)
        decoder = config.get_text_config(decoder=True)
        stored = getattr(decoder, "swaa_config", None)
        if stored is None:
            raise ValueError(
                complaint("config", "one with SWAA", "none", "Call enable_swaa(model, ...) first.")
            )
        super().__init__(config=decoder)
        own = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers)
        if not own or getattr(decoder, "num_kv_shared_layers", False):
            remedy = "Use transformers' DynamicCache."
            raise NotImplementedError(complaint("model", "layers with their own keys", "shared keys", remedy))
        swaa, padding = SWAAConfig(**stored), _left_padding(attention_mask)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and not swaa.decodes_in_full(number):
                assert swaa.sliding_window_size is not None
                self.layers[number] = SlidingLayer(swaa.keep_first + padding, swaa.sliding_window_size - 1)


def _left_padding(attention_mask: torch.Tensor | None) -> int:
    """Of the row that has the most."""
    if attention_mask is None:
        return 0
    check_tensor("attention_mask", attention_mask, shape=("batch", "prompt"))
    return int((attention_mask != 0).int().cumsum(1).eq(0).sum(1).max()) if len(attention_mask) else 0


class SlidingLayer(DynamicLayer):
    """The keys and values of one layer: the first ``head`` tokens and the last ``tail``, of those seen.

    In what it stores, a query of the next call stands as far from each of the last ``tail`` keys as in truth, and
    nothing between the first and the last is visible: a window aligned at the last key needs no positions.
    """

    is_croppable = False

    def __init__(self, head: int, tail: int) -> None:
        super().__init__()
        self.head, self.tail = head, tail
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (batch, nheads_k, tokens, headdim); returns what was stored and the new ones behind it."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        if keys.shape[-2] > self.head + self.tail:
            # Copies: a view would keep everything alive.
            self.keys, self.values = self._kept(keys), self._kept(values)
        return keys, values

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., : self.head, :], x[..., x.shape[-2] - self.tail :, :]], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens stored."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; NotImplementedError once others have been dropped."""
        if tokens_to_remove and self.cumulative_length > self.head + self.tail:
            remedy = "Use transformers' DynamicCache where tokens are taken back."
            raise NotImplementedError(
                complaint("crop", "a cache that has dropped nothing", "one that has", remedy)
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.keys is not None:
            self.cumulative_length = self.keys.shape[-2]


register()
