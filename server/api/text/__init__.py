"""Text to tokens and back: tokenizer, chat templates, incremental detokenizing, stop strings. Knows no HTTP and no engine."""
