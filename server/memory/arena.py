"""One tensor for all that comes and goes on the device: KV blocks and adapters, in blocks of one size.

Owns the memory and nothing of what is where: BlockPool says which blocks are whose. A block is `block_size` tokens' keys and values of all
layers, in the arena's type or another; an adapter is a run of whole blocks. So the two share one budget, and neither is reserved for what
never comes.
"""

import torch


class Arena:
    """`num_blocks` blocks of `block_elements` values, and one more block that stays zero."""

    ALIGNMENT = 64  # bytes; blocks begin at multiples of it

    def __init__(self, num_blocks: int, block_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        """ValueError if blocks would not be aligned."""
        if block_elements * dtype.itemsize % self.ALIGNMENT:
            raise ValueError(f"a block of {block_elements * dtype.itemsize} bytes is not a multiple of {self.ALIGNMENT}")
        self.num_blocks, self.block_elements, self.dtype, self.device = num_blocks, block_elements, dtype, device
        self.data = torch.zeros((num_blocks + 1) * block_elements, dtype=dtype, device=device)  # [elements]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.block_elements * self.dtype.itemsize

    def num_blocks_for(self, num_bytes: int) -> int:
        """Blocks that so many bytes take."""
        return -(-num_bytes // self.block_bytes)

    def run(self, first_block: int, num_bytes: int) -> torch.Tensor:
        """The first bytes of a run of blocks: uint8 [num_bytes]."""
        start = first_block * self.block_bytes
        return self.data.view(torch.uint8)[start : start + num_bytes]

    def pages(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A part of every block, `offset` elements into it: [num_blocks + 1, *shape], each block's part contiguous. `dtype`: of the
        elements, where they are not the arena's."""
        data = self.data if dtype is None else self.data.view(dtype)
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        return data.as_strided((self.num_blocks + 1, *shape), (self.block_bytes // data.itemsize, *strides), offset)
