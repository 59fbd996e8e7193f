"""Paged attention by FlashInfer (arXiv 2501.01005): prefill chunks and decode rows of a step in one call a layer, decode steps capturable.

Owns FlashInfer's wrappers and workspaces. Same interface as PagedAttention, and `plan_graph` for a step that a CUDA graph replays. One
kernel family (fa2, tensor cores) serves both, so that one module is compiled at first use. FlashInfer's own `plan` builds Python lists of a
batch's lengths (0.3 ms for 64 rows); we call the planner beneath it, which needs exactly the version that constraints-gpu.txt pins.
"""

from dataclasses import dataclass

import numpy as np
import torch

from server.model.attention import AttentionShape, SequenceSpan
from sizing.budget import WORKSPACE_BYTES

HEAD_DIMS = (64, 128, 256)


def why_not(shapes: list[AttentionShape], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashInfer cannot compute these layers; None if it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    for shape in shapes:
        if shape.key_dim != shape.value_dim or shape.key_dim not in HEAD_DIMS:
            return f"it has no kernel for heads of {shape.key_dim} and {shape.value_dim}"
        if shape.has_sinks:
            return "attention sinks are not in its plain kernels"
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return None


@dataclass(frozen=True, slots=True)
class Indices:
    """What FlashInfer wants to know of a step, on the host."""

    qo_indptr: np.ndarray  # int32 [sequences + 1]
    kv_indptr: np.ndarray  # int32 [sequences + 1], in pages
    kv_lens: np.ndarray  # int32 [sequences], in tokens
    last_page_lens: np.ndarray  # int32 [sequences]
    pages: np.ndarray  # int32 [pages of all]
    slots: np.ndarray  # int64 [tokens]: where each token's key and value go; -1: nowhere


def index(
    spans: list[SequenceSpan], block_size: int, zero_block: int, num_rows: int | None = None, num_sequences: int | None = None
) -> Indices:
    """The indices of a step, padded to `num_rows` rows where that is given. Then rows are decode rows, one a sequence, and those that are
    padded with look at one position of the zero block; or, with `num_sequences`, of any kind, padded with sequences that have none."""
    lens = np.fromiter((span.context_len for span in spans), np.int32, len(spans))
    counts = np.fromiter((span.num_tokens for span in spans), np.int32, len(spans))
    num_pages = -(-lens // block_size)
    tables = [span.table[:n] for span, n in zip(spans, num_pages.tolist(), strict=True)]
    if counts.max(initial=1) == 1:
        last = np.fromiter((table[-1] for table in tables), np.int64, len(spans))
        slots = last * block_size + (lens - 1) % block_size
    else:
        parts = []
        for span, table in zip(spans, tables, strict=True):
            position = np.arange(span.context_len - span.num_tokens, span.context_len)
            parts.append(table[position // block_size].astype(np.int64) * block_size + position % block_size)
        slots = np.concatenate(parts)
    if num_sequences is not None:
        extra = np.zeros(num_sequences - len(spans), np.int32)
        num_pages, lens, counts = (np.concatenate([a, extra]) for a in (num_pages, lens, counts))
        slots = np.concatenate([slots, np.full(num_rows - len(slots), -1, np.int64)])
    elif num_rows is not None and num_rows > len(spans):
        extra = num_rows - len(spans)
        tables.append(np.full(extra, zero_block, np.int32))
        num_pages = np.concatenate([num_pages, np.ones(extra, np.int32)])
        lens = np.concatenate([lens, np.ones(extra, np.int32)])
        counts = np.concatenate([counts, np.ones(extra, np.int32)])
        slots = np.concatenate([slots, np.full(extra, -1, np.int64)])
    return Indices(
        qo_indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        kv_indptr=np.concatenate([[0], np.cumsum(num_pages)]).astype(np.int32),
        kv_lens=lens,
        last_page_lens=((lens - 1) % block_size + 1).astype(np.int32),
        pages=np.concatenate(tables) if tables else np.zeros(0, np.int32),
        slots=slots,
    )


class _Planner:
    """FlashInfer's wrappers, one for each kind of layer, that share one step's indices.

    For a graph of `num_rows` rows: decode rows, or with `num_sequences` rows of so many sequences."""

    def __init__(self, owner: "FlashInferAttention", num_rows: int | None = None, num_sequences: int | None = None) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._owner, self.num_rows, self.num_sequences, device = owner, num_rows, num_sequences, owner.device
        options = {}
        if num_rows is not None:
            num = num_sequences or num_rows
            self.qo_indptr, self.kv_indptr = (torch.empty(num + 1, dtype=torch.int32, device=device) for _ in range(2))
            self.last_page_lens = torch.empty(num, dtype=torch.int32, device=device)
            self.clear()
            options = dict(
                use_cuda_graph=True,
                qo_indptr_buf=self.qo_indptr,
                paged_kv_indptr_buf=self.kv_indptr,
                paged_kv_indices_buf=owner.graph_pages,
                paged_kv_last_page_len_buf=self.last_page_lens,
            )
        self.wrappers = {}
        for key in owner.kinds:
            wrapper = BatchPrefillWithPagedKVCacheWrapper(owner.workspace, "NHD", backend="fa2", **options)
            if key in owner.int_workspaces:  # in one stream only one plan of a kind is in use at a time
                wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer = owner.int_workspaces[key]
            else:
                owner.int_workspaces[key] = wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer
            self._prepare(wrapper, key)
            self.wrappers[key] = wrapper

    def clear(self) -> None:
        """Indices of a graph as if every sequence had one row and one token. A decode step's `qo_indptr` is always so."""
        for indptr in (self.qo_indptr, self.kv_indptr):
            torch.arange(len(indptr), dtype=torch.int32, device=indptr.device, out=indptr)
        self.last_page_lens.fill_(1)

    def _prepare(self, wrapper, key: "_Kind") -> None:
        """FlashInfer's own plan once: it compiles or loads the module and keeps what does not change, such as the most rows."""
        num = self.num_sequences or self.num_rows or 1
        indptr = torch.arange(num + 1, dtype=torch.int32)
        qo_indptr = indptr.clone()
        qo_indptr[-1] = self.num_rows or 1
        wrapper.plan(
            qo_indptr,
            indptr,
            torch.zeros(num, dtype=torch.int32),
            torch.ones(num, dtype=torch.int32),
            key.num_heads,
            key.num_kv_heads,
            key.dim,
            self._owner.block_size,
            causal=True,
            window_left=key.window_left,
            logits_soft_cap=key.softcap,
            sm_scale=key.scale,
            q_data_type=self._owner.dtype,
            kv_data_type=self._owner.keys[0].dtype,
        )

    def plan(self, indices: Indices, pinned_set: int) -> None:
        """Plan a step. The indices' device copies must be in place before the step runs."""
        owner, batch, num_rows = self._owner, len(indices.kv_lens), self.num_rows or int(indices.qo_indptr[-1])
        qo_indptr, kv_indptr, kv_lens = (torch.from_numpy(a) for a in (indices.qo_indptr, indices.kv_indptr, indices.kv_lens))
        for key, wrapper in self.wrappers.items():
            wrapper._qo_indptr_last, wrapper._batch_size = num_rows, batch
            wrapper._plan_info = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer,
                wrapper._int_workspace_buffer,
                owner.pinned(key, pinned_set),
                qo_indptr,
                kv_indptr,
                kv_lens,
                num_rows,
                batch,
                key.num_heads,
                key.num_kv_heads,
                owner.block_size,
                wrapper.is_cuda_graph_enabled,
                key.dim,
                key.dim,
                True,
                key.window_left,
                -1,  # fixed_split_size
                False,  # disable_split_kv
                0,  # num_colocated_ctas
            )

    def point_to(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, last_page_lens: torch.Tensor, pages: torch.Tensor) -> None:
        """Where the device copies of a step's indices are (a graph's are where they were at its capture)."""
        for wrapper in self.wrappers.values():
            wrapper._qo_indptr_buf, wrapper._paged_kv_indptr_buf = qo_indptr, kv_indptr
            wrapper._paged_kv_last_page_len_buf, wrapper._paged_kv_indices_buf = last_page_lens, pages


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that one wrapper serves."""

    num_heads: int
    num_kv_heads: int
    dim: int
    window_left: int
    softcap: float
    scale: float


def _kind_of(shape: AttentionShape) -> _Kind:
    window_left = -1 if shape.window is None else shape.window - 1
    return _Kind(shape.num_heads, shape.num_kv_heads, shape.key_dim, window_left, shape.softcap or 0.0, shape.scale)


class FlashInferAttention:
    """Keys and values in pages of an arena, attention by FlashInfer."""

    name = "flashinfer"
    captures = True

    def __init__(
        self,
        shapes: list[AttentionShape],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        block_size: int,
        max_pages: int,
        dtype: torch.dtype,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        """keys and values: [blocks, block_size, kv_heads, dim] of each layer; the last block stays zero. `max_pages`: of a graph's step.
        `dtype`: of queries and outputs; keys and values are of the same, or e4m3, which fa2's kernels turn into it as they read.
        `workspace_bytes`: see sizing.budget."""
        from server.kernels.cache import write_kv  # needs Triton

        self._write_kv = write_kv
        self.keys, self.values, self.block_size = keys, values, block_size
        self.device, self.dtype = keys[0].device, dtype
        self.zero_block = keys[0].shape[0] - 1
        self.workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=self.device)
        self.graph_pages = torch.zeros(max_pages, dtype=torch.int32, device=self.device)
        self._kind_of = [_kind_of(shape) for shape in shapes]
        self.kinds = list(dict.fromkeys(self._kind_of))
        self.int_workspaces: dict[_Kind, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pinned: dict[tuple[_Kind, int], torch.Tensor] = {}
        self._pinned_set = 0
        self._eager = _Planner(self)
        self._graphs: dict[tuple[int, int | None], _Planner] = {}
        self._active = self._eager
        self._slots = torch.empty(0, dtype=torch.int64, device=self.device)

    def pinned(self, key: _Kind, which: int) -> torch.Tensor:
        """The planner's page-locked buffer. Four take turns: the copies of one step, whose last layer may be planned by itself, may still
        be queued while the next is planned."""
        if (key, which) not in self._pinned:
            self._pinned[key, which] = torch.empty_like(self.int_workspaces[key][1], pin_memory=True)
        return self._pinned[key, which]

    def plan(self, spans: list[SequenceSpan], *, writes: bool = True) -> None:
        """Take note of a step that runs uncaptured. Not `writes`: all keys and values of the spans are in the cache already."""
        indices = index(spans, self.block_size, self.zero_block)
        sizes = [len(a) for a in (indices.qo_indptr, indices.kv_indptr, indices.last_page_lens, indices.pages)]
        packed = np.concatenate([indices.qo_indptr, indices.kv_indptr, indices.last_page_lens, indices.pages])
        parts = torch.from_numpy(packed).pin_memory().to(self.device, non_blocking=True).split(sizes)
        slots = indices.slots if writes else np.full_like(indices.slots, -1)
        self._slots = torch.from_numpy(slots).pin_memory().to(self.device, non_blocking=True)
        self._active = self._eager
        self._turn()
        self._eager.plan(indices, self._pinned_set)
        self._eager.point_to(*parts)

    def prepare_graph(self, num_rows: int, num_sequences: int | None, slots: torch.Tensor) -> None:
        """Before a graph of `num_rows` rows is captured (decode rows, or of `num_sequences` sequences), with `slots` [num_rows] where each
        step's will be. All graphs of one size have one plan: call it between steps, with nothing of them left on the device."""
        planner = self._graphs.get((num_rows, num_sequences))
        if planner is None:
            planner = self._graphs[num_rows, num_sequences] = _Planner(self, num_rows, num_sequences)
        planner.clear()
        self.graph_pages.zero_()
        self._active, self._slots = planner, slots
        planner.plan(index([], self.block_size, self.zero_block, num_rows, num_sequences), self._pinned_set)

    def plan_graph(
        self, spans: list[SequenceSpan], num_rows: int, num_sequences: int | None
    ) -> tuple[Indices, list[tuple[np.ndarray, torch.Tensor]]]:
        """Plan a replay of a prepared graph: the indices, and what the caller has to copy where before it replays."""
        planner = self._graphs[num_rows, num_sequences]
        indices = index(spans, self.block_size, self.zero_block, num_rows, num_sequences)
        self._turn()
        planner.plan(indices, self._pinned_set)
        copies = [
            *([(indices.qo_indptr, planner.qo_indptr)] if num_sequences else []),
            (indices.kv_indptr, planner.kv_indptr),
            (indices.last_page_lens, planner.last_page_lens),
            (indices.pages, self.graph_pages[: len(indices.pages)]),
        ]
        return indices, copies

    def run(self, layer: int, query, key, value, scale: float, softcap: float | None, sinks) -> torch.Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv_heads, dim] -> [tokens, heads, dim]."""
        self.write(layer, key, value)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        wrapper = self._active.wrappers[self._kind_of[layer]]
        return wrapper.run(query.contiguous(), (self.keys[layer], self.values[layer]), out=out)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key and value [tokens, kv_heads, dim] into the cache, where the step's plan has their places."""
        self._write_kv(self.keys[layer], self.values[layer], self._slots, key, value)

    def _turn(self) -> None:
        self._pinned_set = (self._pinned_set + 1) % 4
