"""The sections of the configuration that concern the service stack: fleet, scaling, endpoint, observability. See `sections`."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from infra.sections import Arn, Section
from sizing.errors import SizingError
from sizing.instances import INSTANCES, Instance, instance_named

# Auto Scaling's, not EventBridge's with its six.
FiveFields = Annotated[str, StringConstraints(pattern=r"^cron\(([0-9A-Za-z*,/-]+ ){4}[0-9A-Za-z*,/-]+\)$")]
Email = Annotated[str, StringConstraints(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")]
Domain = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}$")]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s*]+)$")]


ROOT_MB_S = 250  # of the root volume; the server's environment is gigabytes of libraries, and gp3's own 125 would be felt at each start


class ScheduleConfig(Section):
    """[[fleet.schedules]]"""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9]{0,30}$", description="Unique among the schedules.")
    cron: FiveFields = Field(description="When, in UTC, as cron(minute hour day-of-month month day-of-week).")
    min: int | None = Field(None, ge=0, le=1000, description="New minimum.")
    max: int | None = Field(None, ge=0, le=1000, description="New maximum.")
    desired: int | None = Field(None, ge=0, le=1000, description="New desired number.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.min, self.max, self.desired) == (None, None, None):
            raise ValueError(f"schedule {self.name} changes nothing: give min, max or desired")
        return self


class WarmPoolConfig(Section):
    """[fleet.warm_pool]"""

    state: Literal["stopped", "running"] = Field("stopped", description="G6 cannot hibernate; a stopped instance loses its instance store.")
    min_size: int = Field(1, ge=0, le=100, description="Instances kept ready.")
    max_prepared: int | None = Field(None, ge=1, le=1000, description="Most instances, pool and group together.")


class FleetConfig(Section):
    """[fleet]"""

    instance_type: str = Field("g6.xlarge", description="Any G6, Gr6 or G6e.")
    fallback_types: tuple[str, ...] = Field((), description="Other types to take when there is no capacity, in this order.")
    min: int = Field(1, ge=0, le=1000, description="Fewest instances.")
    max: int = Field(
        2, ge=1, le=1000, description="Most instances. With 1, a deploy that changes it ends the only instance before the new one boots."
    )
    desired: int | None = Field(None, ge=0, le=1000, description="Instances at the first deploy; later the group's own. Auto: min.")
    root_gib: int = Field(
        128, ge=100, le=16_384, description="Encrypted gp3 root volume: system and server; the local cache if there is no NVMe."
    )
    spot_percent: int = Field(0, ge=0, le=100, description="Share of the instances above min that are spot.")
    warm_pool: WarmPoolConfig | None = Field(None, description="Instances kept ready beside the group.")
    scale_in_protection: bool = Field(
        False, description="New instances are protected from scale-in, and so from destroy (docs/deploy.md, Clean up)."
    )
    scale_to_zero: bool = Field(False, description="With min 0: an idle fleet ends, requests at the edge wake it.")
    schedules: tuple[ScheduleConfig, ...] = Field((), description="Sizes by time.")
    grace_s: int | None = Field(
        None, ge=300, le=7200, description="A new instance that does not serve in this time is ended; auto: from the boot phases."
    )
    heal_s: int = Field(
        600, ge=180, le=7200, description="An instance whose server is away for longer is replaced: a start of the engine must fit in it."
    )
    drain_s: int = Field(900, ge=30, le=3600, description="How long running requests may take to finish when an instance goes.")

    @property
    def instance(self) -> Instance:
        """The facts of instance_type."""
        return INSTANCES[self.instance_type]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in (("instance_type", (self.instance_type,)), ("fallback_types", self.fallback_types)):
            for name in names:
                try:
                    instance_named(name)
                except SizingError as error:
                    raise ValueError(f"{key}: {error}") from None
        wanted = self.min if self.desired is None else self.desired
        if not self.min <= wanted <= self.max:
            raise ValueError(f"min <= desired <= max must hold. Given: {self.min}, {wanted}, {self.max}")
        if self.scale_to_zero != (self.min == 0):
            raise ValueError(f"min = 0 and scale_to_zero = true go together: else nothing would wake the fleet. Given: min {self.min}")
        if self.scale_to_zero and self.scale_in_protection:
            raise ValueError("scale_to_zero cannot be had together with scale_in_protection: a protected fleet never ends for being idle")
        if self.warm_pool and (self.spot_percent or self.fallback_types):
            raise ValueError("warm_pool cannot be had together with spot_percent or fallback_types (EC2 Auto Scaling refuses the mix)")
        names = [schedule.name for schedule in self.schedules]
        if len(set(names)) != len(names):
            raise ValueError(f"schedules must differ in name. Given: {', '.join(names)}")
        return self


class ScalingConfig(Section):
    """[scaling]"""

    target_utilization: float = Field(0.7, ge=0.1, le=1.5, description="LoadRatio that the fleet is held at; 1.0: an instance is full.")
    warmup_s: int | None = Field(None, ge=30, le=7200, description="A new instance's load counts so long after it serves; auto: a minute.")
    idle_minutes: int = Field(30, ge=5, le=1440, description="With scale_to_zero: without a request for so long, the fleet ends.")
    scale_in: bool = Field(True, description="Whether the policy also takes instances away.")


class EndpointConfig(Section):
    """[endpoint]"""

    auth: Literal["api_key", "iam", "jwt", "lambda"] = Field("api_key", description="Who may call.")
    jwt_user_pool_arn: Arn | None = Field(None, description="With auth jwt: the Cognito user pool; none: one of our own.")
    jwt_scope: str = Field("manylora/generate", min_length=1, description="With auth jwt: the scope that every other route wants.")
    jwt_tenant_claim: Literal["sub", "client_id"] = Field(
        "sub", description="With auth jwt: the claim that is the tenant; every access token has both."
    )
    jwt_admin_scope: str = Field("manylora/admin", min_length=1, description="With auth jwt: the scope that admin routes want.")
    lambda_arn: Arn | None = Field(None, description="With auth lambda: the authorizer's function.")
    tenants: bool = Field(
        False, description="Callers are tenants, each with its own adapters and limits (docs/tenants.md); the default is one for all."
    )
    key_generation: int = Field(1, ge=1, description="Raise it to have the keys between gateway and servers made anew (docs/upgrades.md).")
    rate: float = Field(20, gt=0, le=10_000, description="Requests a second of the stage, and of a key.")
    burst: int = Field(40, ge=1, le=5_000, description="Requests above rate for a moment.")
    quota_per_day: int | None = Field(None, ge=1, description="With auth api_key: requests of a key a day.")
    domain: Domain | None = Field(None, description="Custom domain; needs certificate_arn.")
    certificate_arn: Arn | None = Field(None, description="ACM certificate of the domain, in the same region.")
    hosted_zone_id: str | None = Field(None, pattern=r"^Z[A-Z0-9]{1,32}$", description="Route 53 zone that gets the domain's record.")
    waf: bool = Field(False, description="AWS WAF with the common managed rules and a rate limit.")
    waf_rate: int = Field(10_000, ge=10, le=2_000_000_000, description="With waf: requests of one address in five minutes.")
    private: bool = Field(False, description="Reachable from vpc_endpoint_ids alone.")
    vpc_endpoint_ids: tuple[str, ...] = Field((), description="With private: execute-api endpoints (vpce-...); none: one of our own.")
    cors_origins: tuple[Origin, ...] = Field((), description="Origins of browsers that may call.")
    account_logging_role: Literal["create", "existing"] = Field(
        "create", description="API Gateway's account-wide role for logs: another stack may own it already."
    )
    timeout_s: int = Field(900, ge=30, le=900, description="Longest answer; 900 is what API Gateway allows to a stream.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.domain is None) != (self.certificate_arn is None):
            raise ValueError("domain and certificate_arn go together")
        for key, needed, there in (
            ("hosted_zone_id", "domain", self.domain is not None),
            ("lambda_arn", "auth lambda", self.auth == "lambda"),
            ("jwt_user_pool_arn", "auth jwt", self.auth == "jwt"),
            ("quota_per_day", "auth api_key", self.auth == "api_key"),
            ("vpc_endpoint_ids", "private = true", self.private),
        ):
            if getattr(self, key) and not there:
                raise ValueError(f"{key} needs {needed}")
        if self.auth == "lambda" and self.lambda_arn is None:
            raise ValueError("auth lambda needs lambda_arn")
        if self.private and self.domain:
            raise ValueError("domain cannot be had with private = true: a private API has no regional domain")
        return self


class ObservabilityConfig(Section):
    """[observability]"""

    log_days: Literal[1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1827, 3653] = Field(
        30, description="Retention of every log group; days that CloudWatch knows."
    )
    alarm_email: Email | None = Field(None, description="Gets the alarms and the notices of the fleet.")
    monthly_budget_usd: int | None = Field(None, ge=1, description="A budget that warns at 80% and 100%; needs alarm_email.")
    tracing: Literal["off", "xray", "otlp"] = Field("off", description="Traces of the gateway and the server.")
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://\S+$", description="With tracing otlp: the collector.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.monthly_budget_usd and not self.alarm_email:
            raise ValueError("monthly_budget_usd needs alarm_email")
        if (self.tracing == "otlp") != (self.otlp_endpoint is not None):
            raise ValueError("tracing otlp and otlp_endpoint go together")
        return self
