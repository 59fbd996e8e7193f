"""The arithmetic of LoRA over a ragged batch: its meaning in plain torch (the CPU's path and every kernel's oracle), and Triton kernels."""
