"""Stand-ins for what is around an instance: the metadata service on loopback, the two calls of Auto Scaling that moto does not have."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class MetadataStandIn:
    """IMDSv2: no path without a token that it gave out. `values` may be changed while it runs."""

    def __init__(self, **values: str) -> None:
        self.values = values
        self.tokens: list[str] = []
        self.requests: list[str] = []
        stand_in = self

        class Answer(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                if self.path != "/latest/api/token" or not self.headers.get("x-aws-ec2-metadata-token-ttl-seconds"):
                    return self._send(400, "")
                stand_in.tokens.append(f"token-{len(stand_in.tokens)}")
                self._send(200, stand_in.tokens[-1])

            def do_GET(self) -> None:
                stand_in.requests.append(self.path)
                if self.headers.get("x-aws-ec2-metadata-token") not in stand_in.tokens:
                    return self._send(401, "")
                value = stand_in.values.get(self.path.removeprefix("/latest/meta-data/"))
                self._send(404, "") if value is None else self._send(200, value)

            def _send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "MetadataStandIn":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Autoscaling:
    """moto's service, and the hooks: parameters are checked against botocore's model, a hook waits only while its name is in `waiting`."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.waiting: set[str] = set()
        self.calls: list[tuple[str, str]] = []

    def complete_lifecycle_action(self, **parameters: str) -> None:
        self._hook("CompleteLifecycleAction", parameters)
        self.waiting.discard(parameters["LifecycleHookName"])

    def record_lifecycle_action_heartbeat(self, **parameters: str) -> None:
        self._hook("RecordLifecycleActionHeartbeat", parameters)

    def _hook(self, operation: str, parameters: dict[str, str]) -> None:
        from botocore.exceptions import ClientError
        from botocore.validate import ParamValidator

        model = self._client.meta.service_model.operation_model(operation)
        report = ParamValidator().validate(parameters, model.input_shape)
        assert not report.has_errors(), report.generate_report()
        if parameters["LifecycleHookName"] not in self.waiting:
            raise ClientError({"Error": {"Code": "ValidationError", "Message": "No active Lifecycle Action found"}}, operation)
        self.calls.append((operation, parameters["LifecycleHookName"]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def make_group(autoscaling: Any, ec2: Any, name: str) -> str:
    """A group of one instance in moto; the instance's id."""
    image = ec2.describe_images()["Images"][0]["ImageId"]
    template = ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData={"ImageId": image, "InstanceType": "g6.xlarge"})
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=name,
        MinSize=1,
        MaxSize=1,
        AvailabilityZones=["us-east-1a"],
        LaunchTemplate={"LaunchTemplateId": template["LaunchTemplate"]["LaunchTemplateId"]},
    )
    return autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"][0]["Instances"][0]["InstanceId"]
