"""Step 3: an adapter into the bucket, and calls over HTTPS through the gateway with the deployed key."""

import concurrent.futures

import httpx

from infra.config import KitConfig
from rehearse.emulator_process import ROOT
from rehearse.endpoint import Endpoint, events_of, target_of
from rehearse.errors import Differs, check
from rehearse.rehearsal import Rehearsal

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ADAPTER, MISSING = "pirate", "nobody-put-this"
_NUM_TOKENS = 12
_MOST_CALLS, _NUM_THREADS = 4000, 16  # until the limit is met; it is 40 at once and 20 a second


def call(rehearsal: Rehearsal) -> None:
    """Base, adapter, streamed; wrong key, over the limit, missing adapter, too long."""
    report, endpoint = rehearsal.report, rehearsal.endpoint
    model = KitConfig.load("dev", ROOT).model.id
    report.begin(3, f"calls over HTTPS through the emulated API Gateway: {endpoint.url}")
    with report.line("base: /generate and /v1/chat/completions answer") as line:
        base = good(endpoint.generate(QUESTION, max_new_tokens=_NUM_TOKENS))["generated_text"]
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": model, "messages": messages, "max_tokens": _NUM_TOKENS, "temperature": 0}
        chat = good(endpoint.call("POST", "/v1/chat/completions", body=body))["choices"][0]["message"]["content"]
        check("Paris" in base and "Paris" in chat, f"{base!r}, {chat!r}")
        line.detail = repr(base)
    with report.line("an adapter that is not there is refused by name") as line:
        line.detail = refused(endpoint.generate(QUESTION, adapter_id=MISSING, max_new_tokens=_NUM_TOKENS), MISSING, status=424)
    with report.line("put into the bucket, it is callable without a deploy") as line:
        upload(rehearsal)
        text = good(endpoint.generate(QUESTION, adapter_id=ADAPTER, max_new_tokens=_NUM_TOKENS))["generated_text"]
        check("Arrr" in text and text != base, f"{text!r}")
        line.detail = repr(text)
    with report.line("both instances answer with it, out of one shared store") as line:
        line.detail = check_both(rehearsal)
    with report.line("/generate_stream: its events make the same text, the last one all of it") as line:
        response = endpoint.generate(QUESTION, path="/generate_stream", adapter_id=ADAPTER, max_new_tokens=_NUM_TOKENS)
        check(response.headers["content-type"].startswith("text/event-stream"), f"{response.headers}")
        events = events_of(response)
        pieces = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        check(len(events) > 2 and events[-1]["generated_text"] == text and pieces == text, f"{events}")
        line.detail = f"{len(events)} events"
    with report.line("without a key, and with a wrong one: 403 from the gateway, no instance is asked") as line:
        for key in (None, "wrong"):
            response = endpoint.call("GET", "/info", key=key)
            check(response.status_code == 403 and target_of(response) is None, f"{response.status_code} {response.text}")
        line.detail = response.text
    with report.line("a prompt that is too long is refused by name") as line:
        line.detail = refused(endpoint.generate("long " * 20_000, max_new_tokens=1), "inputs", status=422)
    with report.line("over the plan's limit: 429 from the gateway, no instance is asked") as line:
        line.detail = check_limit(endpoint)


def good(response: httpx.Response) -> dict:
    """The body of an answer that must be one."""
    check(response.status_code == 200, f"{response.request.url.path}: {response.status_code} {response.text[:300]}")
    return response.json()


def refused(response: httpx.Response, name: str, *, status: int) -> str:
    """The server's own words, which must hold `name`."""
    check(response.status_code == status and name in response.text, f"{response.status_code} {response.text[:300]}")
    check(target_of(response) is not None, "the gateway refused it, not the server")
    return response.text[:160]


def upload(rehearsal: Rehearsal) -> None:
    """As `aws s3 cp --recursive` of README does."""
    bucket = next(outputs["BucketName"] for outputs in rehearsal.cdk.outputs.values() if "BucketName" in outputs)
    client = rehearsal.emulator.client("s3")
    for path in sorted((ROOT / "examples" / "adapters" / ADAPTER).iterdir()):
        client.upload_file(str(path), bucket, f"adapters/{ADAPTER}/{path.name}")


def check_both(rehearsal: Rehearsal) -> str:
    """With as many requests as instances at a time, the one with the fewest gets the next."""
    endpoint, wanted = rehearsal.endpoint, rehearsal.group.targets()
    seen: dict[str | None, str] = {}
    with concurrent.futures.ThreadPoolExecutor(2 * len(wanted)) as threads:
        calls = [
            threads.submit(endpoint.generate, QUESTION, adapter_id=ADAPTER, max_new_tokens=_NUM_TOKENS) for _ in range(4 * len(wanted))
        ]
        for item in calls:
            seen[target_of(item.result())] = good(item.result())["generated_text"]
    check(set(seen) == wanted and len(set(seen.values())) == 1, f"{seen}, not one text from each of {wanted}")
    objects = [path for path in (rehearsal.shared / "store" / "objects").rglob("*") if path.is_file()]
    check(objects, "the shared store is empty")
    return f"{len(seen)} instances"


def check_limit(endpoint: Endpoint) -> str:
    """Calls from several threads until the gateway refuses one."""
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as threads:
        for num_asked in range(0, _MOST_CALLS, 4 * _NUM_THREADS):
            answers = list(threads.map(lambda _: endpoint.call("GET", "/health"), range(4 * _NUM_THREADS)))
            statuses = {item.status_code for item in answers}
            check(statuses <= {200, 429}, f"statuses {statuses}")
            over = [item for item in answers if item.status_code == 429]
            if over:
                check(all(target_of(item) is None for item in over), "an instance was asked beyond the limit")
                return f"{over[0].text} after {num_asked + len(answers) - len(over)} answers or fewer"
    raise Differs(f"{_MOST_CALLS} calls met no limit")
