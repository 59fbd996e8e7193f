"""The instance's metadata service (IMDSv2): who this instance is and what is about to happen to it. The agent asks it every few seconds.

Owns the token. No credentials are read here: boto3 does that by itself.
"""

import http.client
import json
import time
from urllib.parse import urlsplit

DEFAULT_ENDPOINT = "http://169.254.169.254"
_TOKEN_S = 21600
_TIMEOUT_S = 2.0


class MetadataUnavailable(Exception):
    """The service does not answer: this is not an EC2 instance, or metadata is off."""


class InstanceMetadata:
    """Facts of this instance. MetadataUnavailable from every call if the service does not answer."""

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT) -> None:
        self._address = urlsplit(endpoint).netloc
        self._token, self._token_until_at = "", float("-inf")

    @property
    def instance_id(self) -> str:
        """i-..."""
        return self._required("instance-id")

    @property
    def region(self) -> str:
        """The region's name."""
        return self._required("placement/region")

    def lifecycle_target(self) -> str | None:
        """The state that Auto Scaling brings this instance to: InService, Terminated, Warmed:Stopped and so on; None outside a group."""
        return self._get("autoscaling/target-lifecycle-state")

    def spot_notice(self) -> str | None:
        """When EC2 will take this spot instance back ("terminate at 2026-01-01T00:00:00Z"), two minutes ahead; else None."""
        text = self._get("spot/instance-action")
        if text is None:
            return None
        try:
            notice = json.loads(text)
            return f"{notice['action']} at {notice['time']}"
        except (ValueError, KeyError, TypeError):
            return "unreadable notice"

    def _required(self, path: str) -> str:
        value = self._get(path)
        if value is None:
            raise MetadataUnavailable(f"the metadata service has no {path}")
        return value

    def _get(self, path: str) -> str | None:
        for fresh in (False, True):
            status, text = self._request("GET", f"/latest/meta-data/{path}", {"x-aws-ec2-metadata-token": self._session(fresh)})
            if status == 200:
                return text
            if status == 404:
                return None
            if status != 401:  # a token that is not known any more is asked for once again
                break
        raise MetadataUnavailable(f"the metadata service answered {status} to {path}")

    def _session(self, fresh: bool) -> str:
        if fresh or time.monotonic() > self._token_until_at:
            status, text = self._request("PUT", "/latest/api/token", {"x-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)})
            if status != 200:
                raise MetadataUnavailable(f"the metadata service answered {status} to the request for a token")
            self._token, self._token_until_at = text, time.monotonic() + _TOKEN_S / 2
        return self._token

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        # http.client, so that no proxy of the environment ever sees it.
        connection = http.client.HTTPConnection(self._address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            raise MetadataUnavailable(f"the metadata service does not answer ({type(error).__name__})") from error
        finally:
            connection.close()
