"""One base model, thousands of LoRA adapters, one HTTP endpoint."""

__version__ = "0.1.0"
