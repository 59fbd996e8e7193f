"""The API process: HTTP, tokenizing, adapters fetched and packed, tokens streamed. No torch; the engine is another process."""
