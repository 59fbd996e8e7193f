"""y = x W^T by cuBLASLt with a kernel of our choosing, where torch takes the first that the heuristic proposes.

Source: NVIDIA's cuBLAS documentation, "Using the cublasLt API"; the numbers below are those of its header. The library is the one that
torch has loaded, called through ctypes: a launch costs microseconds of Python, so it is for what is captured. model/fastest.py chooses.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

NOT_SUPPORTED = 15  # cublasStatus_t
ALIGNMENT = 256  # bytes: what the heuristic takes for granted of every operand
NUM_PROPOSED = 16
_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType_t
_FLOAT, _COMPUTE_FLOAT = 0, 68  # cudaDataType_t, cublasComputeType_t
_TRANSPOSE_A, _TRANSPOSED = 3, 1  # cublasLtMatmulDescAttributes_t, cublasOperation_t
_MOST_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("kernel", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int32),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int32 * 4),
    ]


class CublasError(RuntimeError):
    """A call of the library that failed, with its status."""

    def __init__(self, function: str, status: int) -> None:
        super().__init__(f"{function} failed with status {status}")
        self.status = status


@cache
def _library() -> ctypes.CDLL:
    """OSError if torch's CUDA has no such library."""
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")


def _call(function: str, *arguments) -> None:
    status = getattr(_library(), function)(*arguments)
    if status:
        raise CublasError(function, status)


def _made(function: str, *arguments) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _call(function, ctypes.byref(made), *arguments)
    return made


def _set(function: str, of: ctypes.c_void_p, attribute: int, value) -> None:
    _call(function, of, ctypes.c_int32(attribute), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


@cache
def _handle(device_index: int) -> ctypes.c_void_p:
    with torch.cuda.device(device_index):
        return _made("cublasLtCreate")


def _matrix(dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
    """A dense matrix whose columns lie one after the other."""
    return _made(
        "cublasLtMatrixLayoutCreate", ctypes.c_int32(_TYPES[dtype]), ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
    )


class _Problem:
    """Products of one size. cuBLAS counts by columns: y^T [out, rows] = W [out, in] x^T [in, rows], and W as it lies is its transpose."""

    def __init__(self, num_rows: int, out: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        self.handle = _handle(device.index or 0)
        self.operation = _made("cublasLtMatmulDescCreate", ctypes.c_int32(_COMPUTE_FLOAT), ctypes.c_int32(_FLOAT))
        _set("cublasLtMatmulDescSetAttribute", self.operation, _TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
        self.weight, self.x, self.y = _matrix(dtype, inner, out), _matrix(dtype, inner, num_rows), _matrix(dtype, out, num_rows)

    def proposals(self) -> list[_Proposal]:
        """Kernels that need no workspace, the heuristic's favourite first."""
        preference = _made("cublasLtMatmulPreferenceCreate")
        _set("cublasLtMatmulPreferenceSetAttribute", preference, _MOST_WORKSPACE, ctypes.c_size_t(0))
        found, count = (_Proposal * NUM_PROPOSED)(), ctypes.c_int32()
        try:
            _call(
                "cublasLtMatmulAlgoGetHeuristic", self.handle, self.operation, self.weight, self.x, self.y, self.y, preference,
                ctypes.c_int32(NUM_PROPOSED), found, ctypes.byref(count),
            )  # fmt: skip
        except CublasError as error:
            if error.status != NOT_SUPPORTED:  # which only says that there are none
                raise
        return [proposal for proposal in found[: count.value] if proposal.status == 0]


class Gemm:
    """x [.., in] of so many rows, W [out, in] -> x W^T [.., out], summed in float32."""

    def __init__(self, problem: _Problem, kernel: Sequence[int]) -> None:
        """`kernel`: cublasLtMatmulAlgo_t as numbers; of this version of the library."""
        self._problem, self.kernel = problem, tuple(kernel)
        self._algorithm = (ctypes.c_uint64 * 8)(*self.kernel)
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Both dense, and at multiples of ALIGNMENT. CublasError if the library refuses."""
        problem, y = self._problem, x.new_empty(*x.shape[:-1], weight.shape[0])
        at = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, y)]
        with torch.cuda.device(x.device):
            _call(
                "cublasLtMatmul", problem.handle, problem.operation, ctypes.byref(self._one), at[0], problem.weight, at[1], problem.x,
                ctypes.byref(self._zero), at[2], problem.y, at[2], problem.y, ctypes.byref(self._algorithm), None, ctypes.c_size_t(0),
                ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
            )  # fmt: skip
        return y


def gemms(num_rows: int, weight: torch.Tensor) -> list[Gemm]:
    """Ways to multiply `num_rows` rows with weights like this one [out, in], the heuristic's favourite first; none for types other than
    bfloat16 and float16. CublasError, or what ctypes raises, if the library cannot be used."""
    problem = _problem(num_rows, weight)
    return [] if problem is None else [Gemm(problem, proposal.kernel) for proposal in problem.proposals()]


def gemm_of(num_rows: int, weight: torch.Tensor, kernel: Sequence[int]) -> Gemm | None:
    """The way that had this `kernel`, in the same version of the library on the same card; None for other types."""
    problem = _problem(num_rows, weight)
    return None if problem is None else Gemm(problem, kernel)


def version() -> int:
    """The library's."""
    get = _library().cublasLtGetVersion
    get.restype = ctypes.c_size_t
    return get()


def _problem(num_rows: int, weight: torch.Tensor) -> _Problem | None:
    if weight.dtype not in _TYPES:
        return None
    out, inner = weight.shape
    return _Problem(num_rows, out, inner, weight.dtype, weight.device)
