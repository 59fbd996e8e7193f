"""cuBLASLt's kernels by themselves: all that are proposed compute the product, captured or not, and one that was kept is itself again."""

import pytest
import torch

from server.kernels import cublaslt
from tests.server.engine.tiny_models import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: MANYLORA_TEST_DEVICE=cuda")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows, out, inner", [(2, 384, 256), (24, 6144, 4096), (64, 4096, 14336), (256, 4096, 4096)])
def test_every_proposal_computes_the_product(num_rows, out, inner, dtype):
    weight = torch.randn(out, inner, device=DEVICE, dtype=dtype) / inner**0.5
    proposed = cublaslt.gemms(num_rows, weight)
    assert proposed
    for gemm in proposed:
        x = torch.randn(num_rows, inner, device=DEVICE, dtype=dtype)
        want = x.double() @ weight.double().T
        poison = torch.full((num_rows, out), torch.nan, device=DEVICE, dtype=dtype)
        del poison  # what new_empty gets next
        y = gemm(x, weight)
        assert y.shape == (num_rows, out) and (y.double() - want).norm() <= 4e-3 * want.norm()


def test_in_a_graph_it_reads_what_is_there_at_replay():
    weight = torch.randn(512, 256, device=DEVICE, dtype=torch.bfloat16) / 16
    gemm, x = cublaslt.gemms(16, weight)[0], torch.zeros(16, 256, device=DEVICE, dtype=torch.bfloat16)
    gemm(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm(x, weight)
    for _ in range(3):
        x.normal_()
        graph.replay()
        want = x.double() @ weight.double().T
        assert (y.double() - want).norm() <= 4e-3 * want.norm()


def test_a_type_that_it_has_no_kernels_for():
    assert cublaslt.gemms(4, torch.randn(8, 16, device=DEVICE)) == []


def test_a_kernel_that_was_kept_is_the_same_again():
    weight = torch.randn(512, 256, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(16, 256, device=DEVICE, dtype=torch.bfloat16)
    for gemm in cublaslt.gemms(16, weight):
        assert torch.equal(cublaslt.gemm_of(16, weight, list(gemm.kernel))(x, weight), gemm(x, weight))
