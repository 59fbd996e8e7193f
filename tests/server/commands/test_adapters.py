"""`python -m server adapters`: pushed, listed, pinned, rolled back and removed on a live server; refused before it is uploaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from server.sources.content import hash_adapter
from tests.server.api.live import LiveServer, live_server
from tests.server.api.test_adapters import PROMPT, write_adapter
from tests.server.commands.conftest import KEY, Run


def answers(live: LiveServer, name: str) -> str | None:
    """The hash of the weights that a request for it ran with."""
    answer = live.post("/generate", {"inputs": PROMPT, "parameters": {"adapter_id": name, "max_new_tokens": 1}})
    if answer.status_code != 200:
        return None
    request_id = answer.headers["x-request-id"]
    return next(one for one in reversed(live.seen("Submit")) if one["request_id"].startswith(request_id))["adapter"]["hash"]


def test_push_puts_a_folder_where_the_server_finds_it_and_publishes_it(live: LiveServer, run: Run, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "greeter", seed=1)
    (folder / "optimizer.bin").write_bytes(b"not a part of it")
    pushed = run("adapters", "push", str(folder), "team/greeter", "--json")
    assert pushed.status == 0, pushed.err
    place = live.folder / "adapters" / "team" / "greeter"
    assert (pushed.json["id"], pushed.json["version"], pushed.json["place"]) == ("team/greeter", 1, str(place.resolve()))
    assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert answers(live, "team/greeter") == hash_adapter(folder, ["adapter_config.json", "adapter_model.safetensors"])
    assert not list((live.folder / "adapters").glob(".push-*"))


def test_a_push_takes_no_other_adapter_away(live: LiveServer, run: Run, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "crew", seed=1)
    assert run("adapters", "push", str(folder), "crew/cook").status == 0
    refused = run("adapters", "push", str(folder), "crew")
    assert refused.status == 2 and "holds folders ('cook'), which may be other adapters" in refused.err
    assert (live.folder / "adapters/crew/cook/adapter_model.safetensors").is_file() and not (
        live.folder / "adapters/crew/adapter_config.json"
    ).exists()
    assert run("adapters", "push", str(folder), "crew/cook").status == 0  # by its own name it is replaced


def test_a_second_push_is_the_next_version_and_rollback_goes_back(live: LiveServer, run: Run, tmp_path: Path) -> None:
    hashes = []
    for seed in (1, 2):
        folder = write_adapter(tmp_path / "turned", seed=seed)
        hashes.append(hash_adapter(folder))
        assert run("adapters", "push", str(folder), "--pin").status == 0
    assert run("adapters", "show", "turned", "--json").json["version"] == 2 and answers(live, "turned") == hashes[1]
    said = run("adapters", "rollback", "turned")
    assert (said.status, said.out) == (0, "turned answers with version 1 again\n")
    assert answers(live, "turned") == hashes[0]
    again = run("adapters", "rollback", "turned")
    assert again.status == 1 and "no version before 1" in again.err and not again.out
    refused = run("adapters", "push", str(folder), "turned", "--no-replace")
    assert refused.status == 1 and "is published already" in refused.err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"target_modules": ["nothing"]}, "target_modules"),
        ({"r": 3}, "shape"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"surprise": 5}, "surprise"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before_it_is_uploaded(
    live: LiveServer, run: Run, tmp_path: Path, config: dict, words: str
) -> None:
    folder = write_adapter(tmp_path / "bad")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    before = sorted((live.folder / "adapters").rglob("*"))
    refused = run("adapters", "push", str(folder))
    assert refused.status == 2 and words in refused.err and "Nothing was uploaded" in refused.err
    assert sorted((live.folder / "adapters").rglob("*")) == before and answers(live, "bad") is None


def test_folders_that_are_none_and_names_that_cannot_be(run: Run, tmp_path: Path) -> None:
    assert "there is no folder" in run("adapters", "push", str(tmp_path / "nowhere")).err
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in run("adapters", "push", str(tmp_path / "pickled")).err
    folder = write_adapter(tmp_path / "fine")
    for name in ("../up", "a//b", ".hidden"):
        refused = run("adapters", "push", str(folder), name)
        assert refused.status == 2 and "NAME" in refused.err, refused.err
    nowhere = run("adapters", "push", str(folder), "--to", str(tmp_path / "not-there"))
    assert nowhere.status == 2 and "no such folder here" in nowhere.err and "--to" in nowhere.err


def test_check_uploads_nothing(live: LiveServer, run: Run, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checked", rank=3)
    checked = run("adapters", "push", str(folder), "--check", "--json").json
    assert checked["rank"] == 3 and checked["hash"] == hash_adapter(folder)
    assert not (live.folder / "adapters" / "checked").exists()


def test_the_orders_one_after_the_other(live: LiveServer, run: Run) -> None:
    write_adapter(live.folder / "adapters" / "ordered", seed=7)
    assert run("adapters", "load", "ordered").out == "ordered is in memory (host)\n"
    assert run("adapters", "pin", "ordered", "--json").json["pinned"] is True
    assert run("adapters", "unpin", "ordered", "--json").json["pinned"] is False
    assert run("adapters", "unload", "ordered").status == 0
    assert run("adapters", "publish", "alias", "--id", "ordered").out == "alias answers with version 1\n"
    listed = run("adapters", "list", "--json", "--search", "ALIAS").json
    assert [(row["id"], row["source_id"], row["version"]) for row in listed] == [("alias", "ordered", 1)]
    table = run("adapters", "list")
    assert table.status == 0 and "ordered" in table.out and "adapters" in table.err and "owner" not in table.out
    unsaid = run("adapters", "rm", "alias")
    assert unsaid.status == 2 and "--yes" in unsaid.err and answers(live, "alias")
    assert run("adapters", "rm", "alias", "--yes", "--json").json["deleted"] is True and answers(live, "alias") is None
    gone = run("adapters", "show", "alias")
    assert gone.status == 1 and "'alias' was not found" in gone.err


def test_names_with_odd_characters_reach_the_server_as_they_are(live: LiveServer, run: Run) -> None:
    name = "team/o d?d#n%2Fame"
    write_adapter(live.folder / "adapters" / name)
    assert run("adapters", "show", name, "--json").json["id"] == name


def test_what_goes_wrong_says_what_to_do(live: LiveServer, run: Run) -> None:
    at = {"MANYLORA_SERVER": live.base_url}
    keyless = run("adapters", "list", environ=at)
    assert keyless.status == 1 and "MANYLORA_KEY" in keyless.err and "HTTP 401" in keyless.err
    wrong = run("adapters", "list", "--key", "wrong", "--json", environ=at)
    assert wrong.status == 1 and "MANYLORA_KEY" in json.loads(wrong.err)["error"] and not wrong.out
    away = run("adapters", "list", "--server", "http://127.0.0.1:9")
    assert away.status == 1 and "no server answers at http://127.0.0.1:9" in away.err and "MANYLORA_SERVER" in away.err
    for argv, words in (
        (["list", "--server", "ftp://x"], "--server must be"),
        (["lst"], "lst"),
        (["pin"], "NAME"),
        (["list", "--serch", "x"], "--serch"),
        (["list", "--key", "with blank"], "--key must be"),
    ):
        refused = run("adapters", *argv)
        assert refused.status == 2 and words in refused.err, refused.err
    other = run("adapters", "list", "--server", f"{live.base_url}/elsewhere")
    assert other.status == 1 and KEY not in other.err


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The endpoint of an S3 with a bucket `models`."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
        yield f"http://{host}:{port}"
    s3.stop()


def test_push_to_a_bucket_replaces_what_lies_there(bucket: str, tmp_path: Path, model_dir: Path, run: Run) -> None:
    options = {"model_bucket": "models", "model_folder": "adapters", "s3_endpoint_url": bucket, "s3_region": "us-east-1"}
    client = boto3.client("s3", endpoint_url=bucket)
    client.put_object(Bucket="models", Key="adapters/sky/tokenizer.json", Body=b"of another adapter")
    with live_server(tmp_path / "live", model_dir, admin_key=KEY, adapters_dir=None, adapter_source="s3", **options) as live:
        folder, at = write_adapter(tmp_path / "sky", seed=3), {"MANYLORA_SERVER": live.base_url, "MANYLORA_KEY": KEY}
        pushed = run("adapters", "push", str(folder), "--json", environ=at)
        assert pushed.status == 0, pushed.err
        assert pushed.json["place"] == "s3://models/adapters/sky" and pushed.json["source"] == "s3"
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="models", Prefix="adapters/")["Contents"]]
        assert keys == ["adapters/sky/adapter_config.json", "adapters/sky/adapter_model.safetensors"]
        assert answers(live, "sky") == hash_adapter(folder)
        denied = run("adapters", "push", str(folder), "--to", "s3://not-there", environ=at)
        assert denied.status == 1 and "AWS credentials" in denied.err


def test_a_server_may_be_started_in_a_shell_that_talks_to_one() -> None:
    from server.settings import read_settings

    assert read_settings(["--model-id", "m"], {"MANYLORA_SERVER": "http://x", "MANYLORA_KEY": "k"}).model_id == "m"
