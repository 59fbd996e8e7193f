"""A client in each of curl, lorax-client and openai. Each takes the server's address and does the same: the base, an adapter, a stream."""
