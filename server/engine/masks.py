"""Grammars' masks on logits: filled in parallel on the host, put on the rows where they are.

Owns the buffers between llguidance and the device. The sampler calls `apply` after penalties and biases, before it draws.
"""

from collections.abc import Mapping

import numpy as np
import torch
from llguidance import LLExecutor

from server.engine.grammar import Matcher
from server.errors import GenerationFailed


class GrammarMasks:
    """Fills and applies the masks of a step. One for a runner; not thread-safe."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._executor = LLExecutor(num_threads)
        self._masks = np.zeros((0, 0), dtype=np.int32)

    def apply(self, logits: torch.Tensor, matchers: Mapping[int, Matcher]) -> dict[int, GenerationFailed]:
        """Set what the grammars forbid to minus infinity, in place: logits [rows, vocabulary], `matchers` by row.

        Returns the rows whose grammar cannot go on; their logits are left as they are. Filling twice changes nothing."""
        if not matchers:
            return {}
        masks = self._fill(list(matchers.values()))  # [matchers, words]
        failed: dict[int, GenerationFailed] = {}
        kept: list[int] = []
        beyond: list[tuple[int, int]] = []  # (row, stop token that llguidance's tokenizer does not have)
        for index, (row, matcher) in enumerate(matchers.items()):
            try:
                beyond += [(row, id) for id in matcher.finish_mask(masks[index]) if id < logits.shape[1]]
                kept.append(index)
            except GenerationFailed as error:
                failed[row] = error
        if not kept:
            return failed
        keep_values = [(row, id, logits[row, id].clone()) for row, id in beyond]
        packed = torch.from_numpy(masks[kept]).to(logits.device, non_blocking=True)  # [kept, words]
        forbidden = ~unpack(packed, logits.shape[1])  # [kept, vocabulary]
        rows = [row for row in matchers if row not in failed]
        if rows == list(range(len(logits))):
            logits.masked_fill_(forbidden, float("-inf"))
        else:
            constrained = torch.tensor(rows, device=logits.device)
            logits[constrained] = logits[constrained].masked_fill(forbidden, float("-inf"))
        for row, id, value in keep_values:
            logits[row, id] = value
        return failed

    def _fill(self, matchers: list[Matcher]) -> np.ndarray:
        num_words = matchers[0].num_words  # the same for all: there is one tokenizer
        if self._masks.shape[0] < len(matchers) or self._masks.shape[1] != num_words:
            self._masks = np.zeros((len(matchers), num_words), dtype=np.int32)
        masks = self._masks[: len(matchers)]
        jobs = [(matcher.inner, index) for index, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, num_words * 4, len(masks))
        return masks


def unpack(masks: torch.Tensor, width: int) -> torch.Tensor:
    """masks int32 [rows, words], bit i of word w for token 32 w + i -> bool [rows, width]; False where `width` is beyond the words."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = ((masks[:, :, None] >> bits) & 1).bool().flatten(1)  # [rows, 32 words]
    if allowed.shape[1] >= width:
        return allowed[:, :width]
    return torch.nn.functional.pad(allowed, (0, width - allowed.shape[1]), value=False)
