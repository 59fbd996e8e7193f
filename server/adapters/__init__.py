"""LoRA adapters as data: a PEFT folder becomes a pack that the engine maps, or a refusal that names the key. No torch, no base weights."""
