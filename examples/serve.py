"""`make serve`: the server on the embedded model with the example adapters, left running, and the curl lines to try.

Owns the words on the terminal; `server_process` owns the process. Ctrl-C or SIGTERM stops it in order.
"""

import argparse
import os
import secrets
import signal
import sys

from examples.embedded_model import ModelUnavailable, ensure_model
from examples.server_process import ServerFailed, ServerProcess, adapter_ids

CURL_LINES = """
Ready. Open {url}/ui and press Ask: base and adapters answer side by side.
For the views Adapters and Live, and for `python -m server adapters`, the key of this server is {key}

Or try, in another terminal:

  # the base
  curl {url}/generate -H 'Content-Type: application/json' \\
    -d '{{"inputs": "The capital of France is", "parameters": {{"max_new_tokens": 16}}}}'

  # an adapter ({adapters}), token by token
  curl -N {url}/generate_stream -H 'Content-Type: application/json' \\
    -d '{{"inputs": "<|im_start|>user\\nWhat is coffee?<|im_end|>\\n<|im_start|>assistant\\n",
         "parameters": {{"max_new_tokens": 48, "adapter_id": "pirate", "adapter_source": "local"}}}}'

  # OpenAI's API: `model` is the base ({model_id}) or an adapter
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "json", "messages": [{{"role": "user", "content": "Greta Costa, a tailor from Geneva, is 52."}}],
         "max_tokens": 64, "temperature": 0}}'
  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "sql", "stream": true, "max_tokens": 48, "temperature": 0, "messages": [{{"role": "user",
         "content": "Table cars(brand, color, price). What is the average price of the cars?"}}]}}'

  # what is there
  curl {url}/v1/models
  curl {url}/info
  python -m server chat --server {url} --adapter pirate "What is coffee?"
  MANYLORA_KEY={key} python -m server adapters list --server {url}

Ctrl-C stops it.
"""


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description="Serve the embedded model and the example adapters.")
    parser.add_argument("--port", type=int, default=8080, help="port on 127.0.0.1; 0 takes a free one (default: 8080)")
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as Ctrl-C does
    try:
        ensure_model()
        key = os.environ.get("MANYLORA_ADMIN_KEY") or secrets.token_urlsafe(18)
        with ServerProcess(port=port, admin_key=key) as server:
            server.wait_healthy(lambda _: None)
            print(CURL_LINES.format(url=server.url, key=key, adapters=", ".join(adapter_ids()), model_id=server.model_id), flush=True)
            raise ServerFailed(f"the server ended by itself, with status {server.wait()}")
    except KeyboardInterrupt:
        return 0
    except (ModelUnavailable, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
