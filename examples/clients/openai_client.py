"""OpenAI's Python client: `python -m examples.clients.openai_client [URL] [ADAPTER]`. Needs `pip install openai`.

`model` is the base's name or an adapter's id.
"""

import argparse

from openai import OpenAI


def main() -> None:
    """List the models, ask the base and the adapter, then stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:3000")
    parser.add_argument("adapter", nargs="?", default="pirate")
    arguments = parser.parse_args()
    with OpenAI(base_url=f"{arguments.url}/v1", api_key="none") as client:
        base, *others = [model.id for model in client.models.list()]
        print("models: ", base, *others)
        for model in (base, arguments.adapter):
            chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "What is coffee?"}], max_tokens=16)
            print(f"{model}:", chat.choices[0].message.content)
        print("stream: ", end="")
        stream = client.completions.create(model=arguments.adapter, prompt="What is coffee?", max_tokens=8, stream=True)
        for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
