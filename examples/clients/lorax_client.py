"""LoRAX's own Python client, unchanged: `python -m examples.clients.lorax_client [URL] [ADAPTER]`.

Needs `pip install --no-deps lorax-client` with aiohttp, requests and pydantic: it pins old versions of packages that it does not use here.
"""

import argparse
import warnings

from lorax import Client

# It calls pydantic's old methods.
warnings.filterwarnings("ignore", category=DeprecationWarning, module="lorax")

# LoRAX's routes take the prompt as it is; this is the embedded model's way to write a user's message.
QUESTION = "<|im_start|>user\nWhat is coffee?<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    """Ask the base and the adapter, then stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:3000")
    parser.add_argument("adapter", nargs="?", default="pirate")
    arguments = parser.parse_args()
    client = Client(arguments.url)
    try:
        print("base:   ", client.generate("The capital of France is", max_new_tokens=8).generated_text)
        response = client.generate(QUESTION, adapter_id=arguments.adapter, max_new_tokens=16)
        print("adapter:", response.generated_text)
        print("tokens: ", response.details.generated_tokens, response.details.finish_reason.value)
        print("stream: ", end="")
        for event in client.generate_stream(QUESTION, adapter_id=arguments.adapter, max_new_tokens=8):
            if not event.token.special:
                print(event.token.text, end="", flush=True)
        print()
    finally:
        if client.session is not None:
            client.session.close()


if __name__ == "__main__":
    main()
