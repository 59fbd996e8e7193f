"""What FlashInfer is told of a step, against the plain meaning of block tables. FlashInfer itself runs in engine/test_gpu.py."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from server.memory.arena import Arena
from server.model.attention import AttentionShape, PagedAttention, SequenceSpan
from server.model.flashinfer import FlashInferAttention, index, why_not

SIZE = 4


def span(start, num_tokens, context_len, first_block):
    table = np.arange(first_block, first_block + 9, dtype=np.int32)[::-1].copy()
    return SequenceSpan(start, num_tokens, context_len, table.tolist(), table)


def check(spans, indices):
    row = 0
    for i, s in enumerate(spans):
        pages = indices.pages[indices.kv_indptr[i] : indices.kv_indptr[i + 1]].tolist()
        assert pages == s.blocks[: -(-s.context_len // SIZE)] and indices.kv_lens[i] == s.context_len
        assert (len(pages) - 1) * SIZE + indices.last_page_lens[i] == s.context_len
        assert indices.qo_indptr[i + 1] - indices.qo_indptr[i] == s.num_tokens
        for position in range(s.context_len - s.num_tokens, s.context_len):
            assert indices.slots[row] == s.blocks[position // SIZE] * SIZE + position % SIZE
            row += 1


def test_decode_rows_alone_and_with_chunks():
    decode = [span(0, 1, 7, 10), span(1, 1, 8, 30), span(2, 1, 1, 50)]
    check(decode, index(decode, SIZE, 99))
    mixed = [*decode, span(3, 5, 5, 60), span(8, 3, 17, 80)]
    check(mixed, index(mixed, SIZE, 99))


@pytest.mark.parametrize("live", [0, 1, 3])
def test_padded_rows_write_nothing_and_look_at_the_zero_block(live):
    spans = [span(i, 1, 5 + i, 10 * i) for i in range(live)]
    indices = index(spans, SIZE, 99, 4)
    check(spans, indices)
    assert indices.slots[live:].tolist() == [-1] * (4 - live) and indices.pages[indices.kv_indptr[live] :].tolist() == [99] * (4 - live)
    assert indices.qo_indptr.tolist() == [0, 1, 2, 3, 4] and indices.kv_lens[live:].tolist() == [1] * (4 - live)


@pytest.mark.parametrize(
    "dim, value_dim, sinks, dtype, reason",
    [
        (128, 128, False, torch.float32, "float32"),
        (96, 96, False, torch.bfloat16, "heads of 96"),
        (128, 64, False, torch.bfloat16, "128 and 64"),
        (64, 64, True, torch.bfloat16, "sinks"),
    ],
)
def test_what_it_cannot_compute_is_said(dim, value_dim, sinks, dtype, reason):
    shape = AttentionShape(2, dim, value_dim, None, 4, 1.0, None, sinks)
    assert reason in why_not([shape], dtype, torch.device("cuda"))
    assert why_not([shape], dtype, torch.device("cpu")) == "there is no GPU"


class Wrapper:
    """Takes the place of FlashInfer's: notes what it is planned with, and computes the plain meaning of what lies in the pages."""

    made = []

    def __init__(self, workspace, layout, backend, **options):
        self.layout, self.backend, self.planned = layout, backend, None
        self._float_workspace_buffer, self._cached_module = workspace, self
        self._int_workspace_buffer = self._pin_memory_int_workspace_buffer = torch.zeros(1)
        self.is_cuda_graph_enabled = "use_cuda_graph" in options
        Wrapper.made.append(self)

    def plan(self, *args, **types):
        if types:  # its own plan; otherwise the module's beneath it
            self.planned = types
        return args

    def run(self, query, pages, out):
        assert query.dtype == self.planned["q_data_type"] == out.dtype
        assert {page.dtype for page in pages} == {self.planned["kv_data_type"]}
        keys, values = (page.to(query.dtype) for page in pages)
        for i in range(len(self._paged_kv_last_page_len_buf)):
            first, last = self._paged_kv_indptr_buf[i : i + 2].tolist()
            rows = slice(*self._qo_indptr_buf[i : i + 2].tolist())
            context = (last - first - 1) * SIZE + int(self._paged_kv_last_page_len_buf[i])
            k, v = (x[self._paged_kv_indices_buf[first:last].long()].flatten(0, 1)[:context] for x in (keys, values))
            num = rows.stop - rows.start
            seen = torch.arange(context) <= torch.arange(context - num, context)[:, None]
            q, k, v = query[rows].transpose(0, 1), k.transpose(0, 1).repeat_interleave(2, 0), v.transpose(0, 1).repeat_interleave(2, 0)
            out[rows] = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.125).transpose(0, 1)
        return out


@pytest.fixture
def connect(monkeypatch):
    """One layer over an arena: our write and plan, with `Wrapper` for what FlashInfer computes; and torch's attention."""
    pytest.importorskip("server.kernels.cache", reason="Triton is not installed", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(FlashInferAttention, "pinned", lambda self, key, which: None)
    Wrapper.made.clear()
    torch.manual_seed(0)

    def make(kept_in):
        shape, here = AttentionShape(2, 64, 64, None, 4, 0.125), torch.device("cpu")
        elements = SIZE * 2 * 64
        arena = Arena(40, 2 * elements * kept_in.itemsize // 2, torch.bfloat16, here)
        keys, values = (arena.pages(part * elements, (SIZE, 2, 64), kept_in) for part in (0, 1))
        mine = FlashInferAttention([shape], [keys], [values], SIZE, 64, torch.bfloat16)
        return mine, PagedAttention.allocate([shape], 40, SIZE, kept_in, here)

    return make


def random_rows(num):
    return torch.randn(num, 4, 64).bfloat16(), torch.randn(num, 2, 64).bfloat16(), torch.randn(num, 2, 64).bfloat16() * 200


@pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_it_is_planned_for_the_types_of_queries_and_of_pages(kept_in, connect):
    mine, right = connect(kept_in)
    keys, values = mine.keys[0], mine.values[0]
    assert [wrapper.planned["kv_data_type"] for wrapper in Wrapper.made] == [kept_in] and Wrapper.made[0].backend == "fa2"
    for spans in ([span(0, 7, 7, 0), span(7, 1, 1, 10)], [span(0, 1, 8, 0), span(1, 1, 2, 10)], [span(0, 5, 13, 0)]):
        q, k, v = random_rows(spans[-1].start + spans[-1].num_tokens)
        said = []
        for attention in (mine, right):
            attention.plan(spans)
            said.append(attention.run(0, q, k, v, 0.125, None, None).float())
        torch.testing.assert_close(*said, atol=2.0, rtol=2e-2)
    assert torch.equal(keys.float(), right.keys[0].float()) and torch.equal(values.float(), right.values[0].float())
    assert float(values.float().abs().max()) == 448 if kept_in == torch.float8_e4m3fn else float(values.float().abs().max()) > 448


@pytest.mark.parametrize("which", [0, 1], ids=["flashinfer", "torch"])
def test_wanted_rows_see_what_the_step_has_written_and_write_nothing(which, connect):
    attention = connect(torch.bfloat16)[which]
    q, k, v = random_rows(8)
    attention.plan([span(0, 7, 13, 0), span(7, 1, 2, 10)])
    whole = attention.run(0, q, k, v, 0.125, None, None)
    kept, nothing = attention.keys[0].clone(), torch.full((4, 2, 64), torch.nan).bfloat16()
    attention.plan([span(0, 3, 13, 0), span(3, 1, 2, 10)], writes=False)
    wanted = attention.run(0, q[4:], nothing, nothing, 0.125, None, None)
    torch.testing.assert_close(wanted, whole[4:], atol=1e-2, rtol=1e-2)
    assert torch.equal(attention.keys[0], kept)
