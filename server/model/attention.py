"""Attention of a flattened ragged batch over a paged cache, as the one attention function that Hugging Face's modules call.

Owns the keys and values of every layer and the per-step plan of who reads what. It does not know requests or adapters. Here is the plain
torch path (SDPA over gathered pages); a faster backend implements the same methods: `plan`, `run`, `write`, `num_bytes`.

The registered function sees q, k, v after rotary embedding (transformers' AttentionInterface); masks are None because no mask function is
registered under our name, so windows come from the call and causality from positions.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from server.model import operators  # noqa: F401 - defines torch.ops.manylora
from server.model.kv_dtype import movable, stored

ATTENTION_NAME = "manylora_paged"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention as the probe saw it."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None  # positions a token sees, itself included; None: all
    num_heads: int = 0
    scale: float = 1.0
    softcap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's share of a step: rows [start, start + num_tokens) of the batch, at positions context_len - num_tokens and on."""

    start: int
    num_tokens: int
    context_len: int  # tokens in the cache once this step's are written
    blocks: list[int]
    table: np.ndarray | None = None  # int32: `blocks` again, where a backend wants them so


@dataclass(slots=True)
class _DecodeBucket:
    rows: torch.Tensor | None  # [n] rows of the batch; None: all rows in order
    tables: torch.Tensor  # [n * blocks] flattened block tables, padded with the zero block
    num_sequences: int
    padded_len: int
    contexts: torch.Tensor  # [n]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """[n, 1, 1, padded_len], True where a position is seen."""
        if window not in self.masks:
            position = torch.arange(self.padded_len, device=self.contexts.device)
            seen = position < self.contexts[:, None]
            if window is not None:
                seen &= position >= self.contexts[:, None] - window
            self.masks[window] = seen[:, None, None, :]
        return self.masks[window]


@dataclass(slots=True)
class _Prefill:
    start: int
    num_tokens: int
    context_len: int
    table: torch.Tensor  # [blocks]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """[num_tokens, context_len], True where a position is seen."""
        if window not in self.masks:
            position = torch.arange(self.context_len, device=self.table.device)
            query = torch.arange(self.context_len - self.num_tokens, self.context_len, device=self.table.device)[:, None]
            seen = position <= query
            if window is not None:
                seen &= position > query - window
            self.masks[window] = seen
        return self.masks[window]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU the pages are the kernel's own zero pages until they are written, so a large cache costs nothing before it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


class PagedAttention:
    """Paged keys and values of all layers, and SDPA over gathered pages."""

    name = "sdpa-gathered"
    captures = False  # its plans make tensors of a step's sizes
    # A bucket of decode rows is padded to its longest context; a new one starts where less than this share of it would be used.
    MIN_FILL = 0.7

    def __init__(self, shapes: list[AttentionShape], keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """keys and values: [blocks, block_size, kv_heads, dim] of each layer, as `allocate` or an arena gives them; in e4m3 they are
        rounded when they are written, and come back in the query's type before anything is computed."""
        self.shapes, self.keys, self.values = shapes, keys, values
        # One block more than sequences can have: it stays zero and is what shorter tables of a bucket are padded with. A position that
        # is masked out is still multiplied by nought, and another request's NaN times nought is NaN.
        self.num_blocks, self.block_size = keys[0].shape[0] - 1, keys[0].shape[1]
        self._fresh: list[int] = []
        self._device = device = keys[0].device
        self._slots = torch.empty(0, dtype=torch.long, device=device)
        self._buckets: list[_DecodeBucket] = []
        self._prefills: list[_Prefill] = []
        # Gathered pages go to buffers that are kept: on a CPU, fresh memory's page faults cost ten times the copy.
        self._scratch: dict[str, torch.Tensor] = {}

    @classmethod
    def allocate(
        cls, shapes: list[AttentionShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "PagedAttention":
        """With a cache of its own, each layer's by itself."""
        keys = [_zeros((num_blocks + 1, block_size, s.num_kv_heads, s.key_dim), dtype, device) for s in shapes]
        values = [_zeros((num_blocks + 1, block_size, s.num_kv_heads, s.value_dim), dtype, device) for s in shapes]
        return cls(shapes, keys, values)

    @staticmethod
    def num_bytes(shapes: list[AttentionShape], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in shapes) * block_size * dtype.itemsize

    def plan(self, spans: list[SequenceSpan], *, writes: bool = True) -> None:
        """Take note of the step: where its keys go and who attends to what. Not `writes`: all of them are in the cache already."""
        size = self.block_size
        slots: list[int] = []
        for span in spans if writes else ():
            slots.extend(span.blocks[p // size] * size + p % size for p in range(span.context_len - span.num_tokens, span.context_len))
        self._slots = torch.tensor(slots, dtype=torch.long, device=self._device)
        # A sequence's last block is part filled; what its last owner left in the rest must not be read.
        self._fresh = [
            s.blocks[s.context_len // size]
            for s in (spans if writes else ())
            if s.context_len % size and s.context_len // size * size >= s.context_len - s.num_tokens
        ]
        self._prefills = [
            _Prefill(s.start, s.num_tokens, s.context_len, torch.tensor(s.blocks[: -(-s.context_len // size)], device=self._device))
            for s in spans
            if s.num_tokens > 1
        ]
        decodes = sorted((s for s in spans if s.num_tokens == 1), key=lambda s: s.context_len)
        self._buckets, bucket, used = [], [], 0
        for span in decodes:
            if bucket and (used + span.context_len) < self.MIN_FILL * span.context_len * (len(bucket) + 1):
                self._buckets.append(self._make_bucket(bucket, len(spans)))
                bucket, used = [], 0
            bucket.append(span)
            used += span.context_len
        if bucket:
            self._buckets.append(self._make_bucket(bucket, len(spans)))

    def _make_bucket(self, spans: list[SequenceSpan], num_spans: int) -> _DecodeBucket:
        blocks = max(-(-s.context_len // self.block_size) for s in spans)
        if len(spans) == num_spans:  # the whole batch decodes in one bucket: back into row order, so that nothing is permuted
            spans = sorted(spans, key=lambda s: s.start)
        tables = [t for s in spans for t in (s.blocks[:blocks] + [self.num_blocks] * (blocks - len(s.blocks)))]
        return _DecodeBucket(
            rows=None if len(spans) == num_spans else torch.tensor([s.start for s in spans], device=self._device),
            tables=torch.tensor(tables, device=self._device),
            num_sequences=len(spans),
            padded_len=blocks * self.block_size,
            contexts=torch.tensor([s.context_len for s in spans], device=self._device),
        )

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [tokens, heads, key_dim], key and value [tokens, kv_heads, dim] -> [tokens, heads, value_dim]."""
        window = self.shapes[layer].window
        if len(self._slots):
            self.write(layer, key, value)
        out = query.new_empty(*query.shape[:2], self.values[layer].shape[-1])  # [tokens, heads, value_dim]
        for bucket in self._buckets:
            k = self._gather("k", self.keys[layer], bucket.tables, bucket.num_sequences, query.dtype)  # [n, len, kv_heads, dim]
            v = self._gather("v", self.values[layer], bucket.tables, bucket.num_sequences, query.dtype)
            q = query if bucket.rows is None else query[bucket.rows]
            n, heads, dim = q.shape
            # The query heads of one KV head stand as rows of one attention: keys are read once for all of them, never repeated.
            q = q.view(n, k.shape[2], heads // k.shape[2], dim)
            group_sinks = None if sinks is None else sinks.view(k.shape[2], -1, 1)
            o = attend(q, k.transpose(1, 2), v.transpose(1, 2), bucket.mask(window), scale, softcap, group_sinks).reshape(n, heads, -1)
            if bucket.rows is None:
                out = o
            else:
                out[bucket.rows] = o
        for chunk in self._prefills:
            k = self._gather("k", self.keys[layer], chunk.table, 1, query.dtype)[0, : chunk.context_len].transpose(0, 1)
            v = self._gather("v", self.values[layer], chunk.table, 1, query.dtype)[0, : chunk.context_len].transpose(0, 1)
            q = query[chunk.start : chunk.start + chunk.num_tokens].transpose(0, 1)  # [heads, tokens, dim]
            repeat = q.shape[0] // k.shape[0]
            q = q.view(k.shape[0], repeat, *q.shape[1:])  # [kv_heads, repeat, tokens, dim]
            k, v = k[:, None].expand(-1, repeat, -1, -1), v[:, None].expand(-1, repeat, -1, -1)
            head_sinks = None if sinks is None else sinks.view(k.shape[0], repeat, 1, 1)
            o = attend(q, k, v, chunk.mask(window), scale, softcap, head_sinks)
            out[chunk.start : chunk.start + chunk.num_tokens] = o.flatten(0, 1).transpose(0, 1)
        return out

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key and value [tokens, kv_heads, dim] into the cache, where the step's plan has their places."""
        keys, values = movable(self.keys[layer]), movable(self.values[layer])
        for block in self._fresh:
            keys[block].zero_()
            values[block].zero_()
        key, value = stored(key, self.keys[layer].dtype), stored(value, self.values[layer].dtype)
        if keys.is_contiguous():
            keys.view(-1, *keys.shape[2:]).index_copy_(0, self._slots, key)
            values.view(-1, *values.shape[2:]).index_copy_(0, self._slots, value)
        else:
            place = (self._slots // self.block_size, self._slots % self.block_size)
            keys.index_put_(place, key)
            values.index_put_(place, value)

    def _gather(self, name: str, cache: torch.Tensor, table: torch.Tensor, num_sequences: int, dtype: torch.dtype) -> torch.Tensor:
        """The table's pages one after the other, in `dtype`: [sequences, positions, kv_heads, dim]."""
        shape = (table.numel(), *cache.shape[1:])
        pages = self._buffer(name if cache.dtype == dtype else "raw", shape, movable(cache).dtype)
        torch.index_select(movable(cache), 0, table, out=pages)
        if cache.dtype != dtype:
            pages = self._buffer(name, shape, dtype).copy_(pages.view(cache.dtype))
        return pages.view(num_sequences, -1, *cache.shape[2:])

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_values = math.prod(shape)
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < num_values:
            buffer = self._scratch[name] = torch.empty(int(num_values * 1.5), dtype=dtype, device=self._device)
        return buffer[:num_values].view(shape)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(scale q k.T) v where `seen`; q [.., rows, dim], k and v [.., len, dim]. `softcap` is Gemma 2's c tanh(x / c);
    `sinks` (GPT-OSS) is one more logit a head, broadcastable to [.., rows, 1], that takes probability and adds no value."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    return torch.matmul(scores.softmax(-1)[..., :-1].to(v.dtype), v)


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """The function that transformers calls: query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim]."""
    key_of_seam = getattr(module, "manylora_key", None)
    if key_of_seam is not None:
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        return torch.ops.manylora.attend(q, k, v, s_aux, key_of_seam)[None], None
    call = module.__dict__.get("manylora_attention")
    if call is None:
        raise RuntimeError(f"{type(module).__name__} was not prepared for paged attention")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = call(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        softcap,
        s_aux,
        kwargs.get("sliding_window"),
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, _attention)
