"""Who holds what memory: KV blocks (no torch) and the tiers of adapters, each under a budget in bytes."""
