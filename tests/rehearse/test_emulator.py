"""The emulator with what is ours in it: unknown types fail by name, hooks wait, the gateway reaches targets, leftovers are seen."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from botocore.exceptions import ClientError

from rehearse.emulator import types
from rehearse.endpoint import Endpoint, target_of

pytestmark = pytest.mark.rehearsal


def template(**resources: dict) -> str:
    return json.dumps({"Resources": resources})


def test_a_type_that_nobody_registered_fails_with_its_name(emulator):
    body = template(Known={"Type": "AWS::SNS::Topic"}, Unknown={"Type": "AWS::Nobody::Knows"})
    with pytest.raises(ClientError, match=r"Unrecognized resource types: \[AWS::Nobody::Knows\]"):
        emulator.client("cloudformation").create_stack(StackName="unknown", TemplateBody=body)
    assert not emulator.client("sns").list_topics()["Topics"]


def test_a_registered_type_is_held_until_it_is_deleted(emulator):
    client = emulator.client("cloudformation")
    body = template(Address={"Type": "AWS::EC2::EIP", "Properties": {"Domain": "vpc"}}, Topic={"Type": "AWS::SNS::Topic"})
    client.create_stack(StackName="held", TemplateBody=body)
    client.get_waiter("stack_create_complete").wait(StackName="held", WaiterConfig={"Delay": 1})
    held = emulator.inventory("held")
    (address,) = [id for id in held["rehearsal.records"] if id.startswith("eipalloc-")]
    assert "sns.topics" in held
    client.delete_stack(StackName="held")
    client.get_waiter("stack_delete_complete").wait(StackName="held", WaiterConfig={"Delay": 1})
    after = emulator.inventory("after")
    assert address not in after.get("rehearsal.records", []) and "sns.topics" not in after


def test_every_recorded_type_is_one_that_the_emulator_lacks(emulator):
    """MiniStack's own provisioner wins; a record that it has learnt by now should go."""
    known = set(json.loads((emulator.state / "own-types.json").read_text()))
    assert not known & set(types.RECORDED)


def test_a_hook_is_completed_only_while_it_waits(emulator):
    client = emulator.client("autoscaling")
    given = {"LifecycleHookName": "drain", "AutoScalingGroupName": "fleet", "InstanceId": "i-1", "LifecycleActionResult": "CONTINUE"}
    with pytest.raises(ClientError, match="No active Lifecycle Action found"):
        client.complete_lifecycle_action(**given)
    (emulator.state / "waiting.json").write_text(json.dumps([["i-1", "drain"]]))
    client.complete_lifecycle_action(**given)
    (call,) = (json.loads(line) for line in (emulator.state / "hooks.jsonl").read_text().splitlines())
    assert call["operation"] == "CompleteLifecycleAction" and call["instance"] == "i-1"


@pytest.fixture
def target():
    """A server that answers with what it was sent."""

    class Echo(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps({"path": self.path, "headers": dict(self.headers)}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def api(emulator):
    """A REST API whose /things/{id} goes to a load balancer, with a key; (endpoint, its key's id, the target group's ARN)."""
    elb, gateway = emulator.client("elbv2"), emulator.client("apigateway")
    balancer = elb.create_load_balancer(Name="inside", Scheme="internal", Subnets=["subnet-1", "subnet-2"])["LoadBalancers"][0]
    group = elb.create_target_group(Name="fleet", Protocol="HTTP", Port=8080, VpcId="vpc-1")["TargetGroups"][0]["TargetGroupArn"]
    elb.create_listener(
        LoadBalancerArn=balancer["LoadBalancerArn"],
        Protocol="HTTP",
        Port=80,
        DefaultActions=[{"Type": "forward", "TargetGroupArn": group}],
    )
    api = gateway.create_rest_api(name="things")["id"]
    root = gateway.get_resources(restApiId=api)["items"][0]["id"]
    things = gateway.create_resource(restApiId=api, parentId=root, pathPart="things")["id"]
    thing = gateway.create_resource(restApiId=api, parentId=things, pathPart="{id}")["id"]
    where = {"restApiId": api, "resourceId": thing, "httpMethod": "GET"}
    gateway.put_method(**where, authorizationType="NONE", apiKeyRequired=True, requestParameters={"method.request.path.id": True})
    gateway.put_integration(
        **where,
        type="HTTP_PROXY",
        integrationHttpMethod="GET",
        uri=f"http://{balancer['DNSName']}:80/things/{{id}}",
        requestParameters={
            "integration.request.path.id": "method.request.path.id",
            "integration.request.header.X-Tenant": "context.identity.apiKeyId",
        },
    )
    gateway.create_deployment(restApiId=api, stageName="live")
    key = gateway.create_api_key(name="first", enabled=True)
    plan = gateway.create_usage_plan(name="plan", apiStages=[{"apiId": api, "stage": "live"}])["id"]
    gateway.create_usage_plan_key(usagePlanId=plan, keyId=key["id"], keyType="API_KEY")
    url = f"https://{api}.execute-api.us-east-1.amazonaws.com/live/"
    with Endpoint(url, key["value"], port=emulator.https_port, certificate=emulator.certificate) as endpoint:
        yield endpoint, key["id"], group


def test_a_request_reaches_a_registered_target_as_a_private_integration_sends_it(emulator, api, target):
    endpoint, key_id, group = api
    assert endpoint.call("GET", "/things/7").status_code == 503  # nobody is registered
    emulator.client("elbv2").register_targets(TargetGroupArn=group, Targets=[{"Id": "i-1", "Port": target}])
    response = endpoint.call("GET", "/things/7")
    seen = response.json()
    assert response.status_code == 200 and target_of(response) == "i-1"
    assert seen["path"] == "/live/things/7"  # with the stage
    assert {name.lower(): value for name, value in seen["headers"].items()}["x-tenant"] == key_id
    assert endpoint.call("GET", "/things/7", key="wrong").status_code == 403


def test_a_target_that_is_gone_is_an_error_and_no_second_try(emulator, api, target):
    endpoint, _, group = api
    (emulator_port,) = [emulator.port]
    dead = next(port for port in range(20_000, 60_000) if port != emulator_port and not _listens(port))
    emulator.client("elbv2").register_targets(TargetGroupArn=group, Targets=[{"Id": "i-gone", "Port": dead}])
    response = endpoint.call("GET", "/things/7")
    assert response.status_code == 502 and target_of(response) == "i-gone" and "message" in response.json()


def test_the_certificate_is_checked(emulator):
    with (
        Endpoint("https://a.example.com/live/", "key", port=emulator.https_port, certificate=emulator.certificate) as endpoint,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        endpoint.call("GET", "/")


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
