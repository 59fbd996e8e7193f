"""The module that AWS Lambda gives to functions inlined in a template: tells CloudFormation how a custom resource ended.

As AWS documents it (docs.aws.amazon.com/lambda, "cfn-response module"). The emulator's functions find it by PYTHONPATH.
"""

import json
import urllib.request

SUCCESS, FAILED = "SUCCESS", "FAILED"


def send(event, context, responseStatus, responseData, physicalResourceId=None, noEcho=False, reason=None):
    """One PUT to the URL that the event carries."""
    body = {
        "Status": responseStatus,
        "Reason": reason or f"See the log stream {context.log_stream_name}",
        "PhysicalResourceId": physicalResourceId or context.log_stream_name,
        "StackId": event["StackId"],
        "RequestId": event["RequestId"],
        "LogicalResourceId": event["LogicalResourceId"],
        "NoEcho": noEcho,
        "Data": responseData,
    }
    request = urllib.request.Request(event["ResponseURL"], json.dumps(body).encode(), {"content-type": ""}, method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
