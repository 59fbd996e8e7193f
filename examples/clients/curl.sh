#!/usr/bin/env bash
# LoRAX's and OpenAI's routes with curl alone.
#   examples/clients/curl.sh [URL] [ADAPTER]     the defaults are those of `make serve`
set -euo pipefail
url=${1:-http://127.0.0.1:3000}
adapter=${2:-pirate}

# LoRAX's routes take the prompt as it is; this is the embedded model's way to write a user's message.
question='<|im_start|>user\nWhat is coffee?<|im_end|>\n<|im_start|>assistant\n'

# post PATH BODY
post() {
  curl --silent --show-error --fail-with-body --no-buffer "$url$1" --header 'content-type: application/json' --data "$2"
  echo
}

echo "# the base"
post /generate '{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}'

echo "# an adapter"
post /generate '{"inputs": "'"$question"'", "parameters": {"max_new_tokens": 16, "adapter_id": "'"$adapter"'"}}'

echo "# token by token"
post /generate_stream '{"inputs": "'"$question"'", "parameters": {"max_new_tokens": 4, "adapter_id": "'"$adapter"'"}}'

echo "# OpenAI's API: the adapter is the model"
post /v1/chat/completions '{"model": "'"$adapter"'", "messages": [{"role": "user", "content": "What is coffee?"}], "max_tokens": 16}'

echo "# what there is"
curl --silent --show-error --fail-with-body "$url/v1/models"
echo
