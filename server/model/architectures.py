"""Which of transformers' architectures are served: those that a test compares with plain Hugging Face, batch by ragged batch.

An architecture that is not here may well work; it is refused by name until `--allow-unverified-architecture` says that it may be tried.
"""

# tests/server/engine/test_architectures.py builds a tiny random model of each and fails if one is missing there.
VERIFIED = frozenset(
    {
        "cohere",
        "cohere2",
        "deepseek_v3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
