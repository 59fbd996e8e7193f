"""The dashboard: one page that answers, from top to bottom, who calls, how long they wait, what the fleet does and what it costs.

Owns the page alone; every series comes from `signals`. `Observability` makes it.
"""

from aws_cdk import Duration
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_cloudwatch as cw
from constructs import Construct

from infra.config import KitConfig
from infra.endpoint import Endpoint
from infra.load_balancer import LoadBalancer
from infra.signals import LOAD_RATIO, balancer_metric, computed, gateway_metric, group_metric, server_metric
from sizing.instances import PRICE_REGION, PRICES_OF

_WIDTH, _HEIGHT = 8, 6  # three graphs a row


class Dashboard(Construct):
    """`dashboard`."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        config: KitConfig,
        group: autoscaling.IAutoScalingGroup,
        load_balancer: LoadBalancer,
        endpoint: Endpoint,
    ) -> None:
        super().__init__(scope, id)
        self._config, self._group, self._load_balancer, self._api = config, group, load_balancer, endpoint.api
        rows = [self._callers(), self._server(), self._memory(), self._fleet()]
        self.dashboard = cw.Dashboard(self, "Dashboard", default_interval=Duration.hours(6), widgets=rows)

    def _callers(self) -> list[cw.IWidget]:
        count, errors = (
            gateway_metric(self._api, "Count", "Sum"),
            [gateway_metric(self._api, name, "Sum") for name in ("4XXError", "5XXError")],
        )
        quantiles = ("p50", "p95", "p99")
        whole = [gateway_metric(self._api, "Latency", stat, label=stat) for stat in quantiles]
        refused = [balancer_metric(self._load_balancer, name) for name in ("HTTPCode_ELB_5XX_Count", "HTTPCode_Target_5XX_Count")]
        return [
            _graph("Requests a minute", [count], right=errors),
            _graph("Latency of the gateway, ms (a stream's: to its end)", whole),
            _graph("Errors behind the gateway", refused),
        ]

    def _server(self) -> list[cw.IWidget]:
        tokens = server_metric(self._group, "OutputTokens", "Sum")
        rate = computed("tokens / PERIOD(tokens)", label="tokens/s, fleet", tokens=tokens)
        waiting = [server_metric(self._group, name, "Average", label=f"{name}, an instance") for name in ("Running", "Queued")]
        load = [server_metric(self._group, LOAD_RATIO, stat, label=stat) for stat in ("Average", "Maximum")]
        target = cw.HorizontalAnnotation(value=self._config.scaling.target_utilization, label="target")
        return [_graph("Output tokens", [rate]), _graph("Sequences", waiting), _graph(LOAD_RATIO, load, line=target)]

    def _memory(self) -> list[cw.IWidget]:
        tiers = [server_metric(self._group, name, "Average") for name in ("AdaptersOnDevice", "AdaptersInHost")]
        used, there = (server_metric(self._group, name, "Average") for name in ("KvBlocksUsed", "KvBlocks"))
        share = computed("100 * used / there", label="KV blocks used, %", used=used, there=there)
        gpu = [server_metric(self._group, name, "Average") for name in ("nvidia_smi_utilization_gpu", "nvidia_smi_utilization_memory")]
        host = [server_metric(self._group, name, "Maximum") for name in ("mem_used_percent", "disk_used_percent")]
        return [
            _graph("Adapters by tier, an instance", tiers),
            _graph("KV cache, %", [share], right=host),
            _graph("GPU, %", gpu, right=[server_metric(self._group, "GpuErrors", "Sum")]),
        ]

    def _fleet(self) -> list[cw.IWidget]:
        sizes = [group_metric(self._group, f"Group{name}") for name in ("DesiredCapacity", "InServiceInstances", "PendingInstances")]
        hosts = [
            balancer_metric(self._load_balancer, f"{name}HostCount", "Average", by_target_group=True) for name in ("Healthy", "UnHealthy")
        ]
        return [_graph("Instances", sizes), _graph("Instances as the load balancer sees them", hosts), self._cost()]

    def _cost(self) -> cw.IWidget:
        """On-demand price times instances; where no price is known, the page says so."""
        instance = self._config.fleet.instance
        if instance.usd_per_hour is None:
            text = f"**Cost an hour**: no price of {instance.name} is known to the kit."
            return cw.TextWidget(markdown=text, width=_WIDTH, height=_HEIGHT)
        serving = group_metric(self._group, "GroupTotalInstances")
        label = f"{instance.name}, on demand, {PRICE_REGION}, prices of {PRICES_OF}"
        usd = computed(f"FILL(total, 0) * {instance.usd_per_hour}", label=label, total=serving)
        return _graph("USD an hour, instances alone", [usd])


def _graph(
    title: str, left: list[cw.IMetric], *, right: list[cw.IMetric] | None = None, line: cw.HorizontalAnnotation | None = None
) -> cw.GraphWidget:
    return cw.GraphWidget(
        title=title,
        left=left,
        right=right or [],
        left_y_axis=cw.YAxisProps(min=0),
        left_annotations=[line] if line else None,
        width=_WIDTH,
        height=_HEIGHT,
    )
