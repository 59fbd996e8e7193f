"""Tenants through the deployment: the gateway names them and proves that it is the gateway; the servers believe nobody else."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from infra.config import ConfigError, KitConfig
from infra.endpoint import ADMIN_HEADER, GATEWAY_HEADER, STAGE, TENANT_HEADER
from infra.routes import ROUTES, Access, mapped
from infra.user_data import server_environment
from server.api.tenants import callers
from server.api.tenants.rules import parse_rules
from server.settings import read_settings
from tests.infra.edge_stack import JWT, LAMBDA, ROOT
from tests.infra.edge_stack import synth as synth_edge
from tests.infra.test_fleet import user_data_of
from tests.server.api.tenants.world import GATEWAY_KEY, World, submitted

AUTHS = {"api_key": {}, "iam": {"endpoint.auth": "iam"}, "jwt": JWT, "lambda": LAMBDA}
TENANTS = {"endpoint.tenants": True}
OPEN = {(route.method, route.path) for route in ROUTES if route.access is Access.ANYONE}
FIRST_FILE = ROOT / "ami" / "tenants.toml"


def headers(method) -> dict[str, object]:
    """What the gateway writes into a request of a method."""
    start, found = "integration.request.header.", method["Integration"].get("RequestParameters", {})
    return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}


def test_the_gateway_and_the_servers_mean_the_same_headers() -> None:
    assert (TENANT_HEADER, GATEWAY_HEADER, ADMIN_HEADER) == (callers.TENANT_HEADER, callers.GATEWAY_KEY_HEADER, callers.ADMIN_HEADER)


@pytest.mark.parametrize("auth", AUTHS)
def test_the_gateway_proves_itself_wherever_it_names_a_tenant(auth: str) -> None:
    template = synth_edge(AUTHS[auth] | TENANTS)
    keys = [json.dumps(headers(method).get(GATEWAY_HEADER)) for key, method in template.methods().items() if key not in OPEN]
    assert len(keys) > 10 and len(set(keys)) == 1 and "{{resolve:secretsmanager:" in keys[0] and "GatewayKey" in keys[0]
    for key in OPEN:
        assert headers(template.methods()[key]) == {TENANT_HEADER: "'anonymous'"}
    assert not any(GATEWAY_HEADER in headers(method) for method in synth_edge(AUTHS[auth]).methods().values())


def test_a_tenant_may_order_where_no_admin_can_be_told() -> None:
    """By key: the routes are every caller's, without the operator's key. By authorization: they stay the operator's."""
    admin = {(route.method, route.path) for route in ROUTES if route.access is Access.ADMIN}
    by_key, by_scope = synth_edge(TENANTS).methods(), synth_edge(JWT | TENANTS).methods()
    assert admin <= set(by_key) and set(by_key) == {(route.method, route.path) for route in mapped(has_admin=False, tenants=True)}
    for key in admin:
        assert by_key[key]["ApiKeyRequired"] is True and ADMIN_HEADER not in headers(by_key[key])
        assert ADMIN_HEADER in headers(by_scope[key]) and by_scope[key]["AuthorizationScopes"] == ["manylora/admin"]
    assert not admin & set(synth_edge().methods())


class Shared:
    shows_bucket = False


def environment(overrides) -> dict[str, str]:
    config = KitConfig.load("dev", ROOT, overrides)
    return server_environment(config, shared_files=Shared(), bucket_name="bucket", port=8080, region="eu-west-1")


def test_the_servers_share_the_file_and_are_told_of_it() -> None:
    settings = read_settings([], environment(TENANTS))
    assert settings.tenants_file == settings.registry_dir / "tenants.toml"
    assert read_settings([], environment({})).tenants_file is None
    for name, words in (("tenants_file", "endpoint.tenants"), ("gateway_key", "made by the kit")):
        with pytest.raises(ConfigError, match=words):
            KitConfig.load("dev", ROOT, {f"server.{name}": "0123456789abcdef"})


def test_instances_read_the_key_and_no_other(synth) -> None:
    template = synth({"endpoint.tenants": True})["service"]
    assert re.search(r"GATEWAY_SECRET_ARN='[^']", user_data_of(template))
    assert "MANYLORA_TENANTS_FILE='/" in user_data_of(template)
    secrets = [name for name, item in template["Resources"].items() if item["Type"] == "AWS::SecretsManager::Secret"]
    allowed = [
        statement["Resource"] for item in template["Resources"].values() if item["Type"] == "AWS::IAM::Policy"
        for statement in item["Properties"]["PolicyDocument"]["Statement"] if "secretsmanager:GetSecretValue" in statement["Action"]
    ]  # fmt: skip
    assert len(secrets) == 1 and allowed == [{"Ref": secrets[0]}]
    assert "GATEWAY_SECRET_ARN=''" in user_data_of(synth({})["service"])


def test_both_keys_go_into_memory(tmp_path: Path) -> None:
    (tmp_path / "aws").write_text('#!/bin/bash\n[[ "$*" == *arn:admin* ]] && echo admin-value || echo gateway-value\n')
    (tmp_path / "aws").chmod(0o755)
    run, host_env = tmp_path / "run", tmp_path / "host.env"
    for given, wanted in (
        (
            'ADMIN_SECRET_ARN="arn:admin"\nGATEWAY_SECRET_ARN="arn:gateway"',
            "MANYLORA_ADMIN_KEY=admin-value\nMANYLORA_GATEWAY_KEY=gateway-value\n",
        ),
        ('ADMIN_SECRET_ARN=""\nGATEWAY_SECRET_ARN="arn:gateway"', "MANYLORA_GATEWAY_KEY=gateway-value\n"),
        ('ADMIN_SECRET_ARN=""\nGATEWAY_SECRET_ARN=""', None),
    ):
        host_env.write_text(f'REGION="eu-west-1"\n{given}\n')
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUN": str(run), "HOST_ENV": str(host_env)}
        subprocess.run(["bash", str(ROOT / "ami" / "admin-key.sh")], env=variables, check=True)
        assert ((run / "key.env").read_text() if (run / "key.env").exists() else None) == wanted


def first_file(folder: Path, **variables: str) -> None:
    """Run the step of user-data that puts the first file."""
    script = (ROOT / "ami" / "user-data.sh").read_text()
    step = re.search(r"^first_tenants\(\) \{.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert step is not None
    (folder / "current").mkdir(exist_ok=True)
    (folder / "current" / "ami").unlink(missing_ok=True)
    (folder / "current" / "ami").symlink_to(ROOT / "ami")
    text = f"set -euo pipefail\nPREFIX={folder}\nUSER_ID=0\n{step[0]}\nfirst_tenants\n"
    subprocess.run(["bash", "-c", text], env={"PATH": "/usr/bin:/bin", **variables}, check=True)


@pytest.mark.parametrize("prefix", ["adapters", ""])
def test_an_instance_puts_a_first_file_and_never_touches_another(tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "tenants.toml"
    place = {"MANYLORA_MODEL_BUCKET": "bucket", "MANYLORA_MODEL_FOLDER": prefix}
    first_file(tmp_path, MANYLORA_TENANTS_FILE=str(file), **place)
    rules = parse_rules(tomllib.loads(file.read_text()))
    tenant = rules.of_gateway("a1b2c3d4e5")
    assert tenant is not None and tenant.name == "a1b2c3d4e5"
    start = f"bucket/{prefix}".rstrip("/")
    assert tenant.sources == {"local": ("a1b2c3d4e5",), "s3": (f"{start}/a1b2c3d4e5",)}
    assert rules.shared.sources == {"local": ("shared",), "s3": (f"{start}/shared",)}
    file.write_text("[tenants.mine]\n")
    first_file(tmp_path, MANYLORA_TENANTS_FILE=str(file), **place)
    assert file.read_text() == "[tenants.mine]\n"
    first_file(tmp_path, **place)  # without tenants
    assert {path.name for path in tmp_path.iterdir()} == {"current", "tenants.toml"}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, model_dir):
    """A server as an instance of such a deployment runs it, with the file that an instance begins with."""
    folder = tmp_path_factory.mktemp("deployed")
    text = FIRST_FILE.read_text().replace("@PLACE@", "bucket/adapters")
    world = World(folder, text + '[tenants.acme]\ngateway = ["key-of-acme"]\n')
    with world.server("a", model_dir, root_path=f"/{STAGE}", admin_key=None) as live:
        yield world, live


def through_the_gateway(live, method: str, path: str, *, tenant: str, template, sent=(), body=None):
    """A request as API Gateway passes it on: the stage before the path, its own headers over the caller's."""
    (mapping,) = [one for (verb, pattern), one in template.methods().items() if verb == method and pattern == path]
    written = {name.lower(): value for name, value in headers(mapping).items()}
    values = {"context.identity.apiKeyId": tenant}
    passed = {name.lower(): value for name, value in dict(sent).items()}
    for name, value in written.items():
        passed[name] = values.get(value, GATEWAY_KEY) if isinstance(value, str) and value.startswith("context.") else (
            value.strip("'") if isinstance(value, str) else GATEWAY_KEY
        )  # fmt: skip
    return live.client.request(method, f"/{STAGE}{path}", json=body, headers=passed)


def test_callers_of_a_deployment_are_tenants(deployed) -> None:
    """Each key of the usage plan sees its own adapters; a header that a caller writes changes nothing; who comes past the gateway gets in
    nowhere."""
    world, live = deployed
    template = synth_edge(TENANTS)
    body = {"inputs": "one two", "parameters": {"adapter_id": "acme/sql", "max_new_tokens": 2}}
    answer = through_the_gateway(live, "POST", "/generate", tenant="key-of-acme", template=template, body=body)
    assert answer.status_code == 200 and submitted(live, answer)["tenant"] == "acme"
    other = through_the_gateway(live, "POST", "/generate", tenant="a1b2c3d4e5", template=template, body=body)
    assert other.status_code == 424
    forged = {"X-Manylora-Tenant": "acme", "X-Manylora-Gateway-Key": "guessed", "X-Manylora-Admin-Key": "guessed", "x-api-key": "k"}
    forging = through_the_gateway(live, "POST", "/generate", tenant="a1b2c3d4e5", template=template, body=body, sent=forged)
    assert forging.status_code == 424
    published = through_the_gateway(
        live, "POST", "/v1/adapters", tenant="key-of-acme", template=template, body={"name": "mine", "source": "local", "id": "acme/sql"}
    )
    assert published.status_code == 200, published.text
    for tenant, is_there in (("key-of-acme", True), ("a1b2c3d4e5", False)):
        listed = through_the_gateway(live, "GET", "/v1/models", tenant=tenant, template=template).json()["data"]
        assert ("mine" in [one["id"] for one in listed]) == is_there
    assert live.client.post("/generate", json=body, headers=forged).status_code == 401
    assert live.client.get("/health").status_code == 200  # the load balancer's question
    assert "manylora_load_ratio" in live.client.get("/metrics").text  # the agent's, on the instance
