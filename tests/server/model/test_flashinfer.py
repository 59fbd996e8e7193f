"""What FlashInfer is told of a step, against the plain meaning of block tables. FlashInfer itself runs in engine/test_gpu.py."""

import numpy as np
import pytest
import torch

from server.model.attention import AttentionShape, SequenceSpan
from server.model.flashinfer import index, why_not

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
