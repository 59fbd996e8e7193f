"""The sections of the configuration: each key with its bounds, default and description.

Owns what one section can check by itself; rules between sections are in `config`, which reads files and makes the errors. Knows nothing of
CDK. docs/deploy.md's table is made from the descriptions.
"""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Cron = Annotated[str, StringConstraints(pattern=r"^(cron\([^()]+\)|rate\([0-9]+ [a-z]+\))$")]
Arn = Annotated[str, StringConstraints(pattern=r"^arn:aws[a-z-]*:[a-z0-9-]+:[a-z0-9-]*:[0-9]*:.+$")]
Prefix = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*/)+$")]


class Section(BaseModel):
    """What every section has in common: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class NetworkConfig(Section):
    """[network]"""

    vpc_id: str | None = Field(None, pattern=r"^vpc-[0-9a-f]{8,17}$", description="An existing VPC; none: one of our own.")
    availability_zones: tuple[str, ...] = Field(
        (), description="Zones by name, for where the instance type is not in every zone; required with vpc_id. Empty: the region's first."
    )
    private_subnet_ids: tuple[str, ...] = Field((), description="With vpc_id: the fleet's subnets, one a zone, in the same order.")
    max_azs: int = Field(2, ge=2, le=6, description="Zones of our own VPC.")
    cidr: str = Field("10.42.0.0/16", description="Range of our own VPC, /16 to /22.")
    nat: Literal["one", "none"] = Field(
        "one", description="Way out of the private subnets. With none, all that an instance needs is in the image or the bucket."
    )
    public_fleet: bool = Field(
        False, description="Instances in the public subnets with public addresses (as in the article); nothing is opened by it."
    )
    admin_cidr: str | None = Field(None, description="Range that may use SSH and ICMP, /24 or narrower; needs key_pair.")
    key_pair: str | None = Field(None, min_length=1, max_length=255, description="Name of the EC2 key pair for SSH; needs admin_cidr.")
    interface_endpoints: bool | None = Field(
        None,
        description="Private endpoints for the AWS services that instances call (7 USD a month, service and zone). Auto: with nat none.",
    )
    flow_logs: bool = Field(True, description="VPC flow logs of our own VPC, kept for observability.log_days.")

    @property
    def has_nat(self) -> bool:
        """Whether private subnets have a way out: a public fleet needs none, it has its own."""
        return self.nat == "one" and not self.public_fleet

    @property
    def has_way_out(self) -> bool:
        """Whether an instance reaches the internet."""
        return self.has_nat or self.public_fleet

    @property
    def endpoints(self) -> bool:
        """interface_endpoints, resolved."""
        return self.interface_endpoints if self.interface_endpoints is not None else not self.has_way_out and self.vpc_id is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        cidr = _network("cidr", self.cidr)
        if not 16 <= cidr.prefixlen <= 22 or not cidr.is_private:
            raise ValueError(f"cidr must be a private range of /16 to /22. Given: {self.cidr}")
        if self.vpc_id:
            for key in ("cidr", "max_azs", "flow_logs", "public_fleet"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key} belongs to a VPC of our own and vpc_id names an existing one; remove one of the two")
            if len(self.private_subnet_ids) < 2 or len(self.private_subnet_ids) != len(self.availability_zones):
                raise ValueError("vpc_id needs private_subnet_ids and availability_zones: two or more, as many of one as of the other")
        elif self.private_subnet_ids:
            raise ValueError("private_subnet_ids needs vpc_id")
        elif self.availability_zones and len(self.availability_zones) != self.max_azs:
            raise ValueError(f"availability_zones must name max_azs ({self.max_azs}) zones. Given: {len(self.availability_zones)}")
        if len(set(self.availability_zones)) != len(self.availability_zones):
            raise ValueError("availability_zones names a zone twice")
        if self.public_fleet and self.nat == "one" and "nat" in self.model_fields_set:
            raise ValueError("nat one is of no use with public_fleet = true: nothing would pass it; remove one of the two")
        if not self.has_way_out and self.vpc_id is None and self.interface_endpoints is False:
            raise ValueError("interface_endpoints must not be false with nat none: instances would reach no AWS service")
        self._check_admin()
        return self

    def _check_admin(self) -> None:
        if (self.admin_cidr is None) != (self.key_pair is None):
            missing = "key_pair" if self.key_pair is None else "admin_cidr"
            raise ValueError(f"admin_cidr and key_pair go together; {missing} is missing (without both, access is by Session Manager)")
        if self.admin_cidr is None:
            return
        admin = _network("admin_cidr", self.admin_cidr)
        if admin.prefixlen < 24:
            raise ValueError(f"admin_cidr must be /24 or narrower, for example {admin.network_address}/32. Given: {self.admin_cidr}")
        if admin.is_global and not self.public_fleet:
            raise ValueError(
                f"admin_cidr {self.admin_cidr} is a public range, which cannot reach private subnets: set public_fleet = true, or give the "
                "range of a VPN or peer"
            )


class EfsConfig(Section):
    """[storage.efs]"""

    throughput: Literal["elastic", "bursting"] = Field("elastic", description="Throughput mode.")
    transition_days: Literal[0, 7, 14, 30, 60, 90] = Field(30, description="Files unread for so long move to Infrequent Access; 0: never.")


class FsxConfig(Section):
    """[storage.fsx]"""

    capacity_gib: int = Field(1200, ge=1200, le=100_800, description="1200, or a multiple of 2400.")
    deployment: Literal["SCRATCH_2", "PERSISTENT_2"] = Field("SCRATCH_2", description="SCRATCH_2 is cheaper; PERSISTENT_2 replaces disks.")
    throughput: Literal[125, 250, 500, 1000] = Field(125, description="MB/s per TiB, of PERSISTENT_2.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.capacity_gib != 1200 and self.capacity_gib % 2400:
            raise ValueError(f"capacity_gib must be 1200 or a multiple of 2400. Given: {self.capacity_gib}")
        if self.deployment == "SCRATCH_2" and "throughput" in self.model_fields_set:
            raise ValueError("throughput is fixed (200 MB/s per TiB) with deployment SCRATCH_2; remove it or take PERSISTENT_2")
        return self


class S3FilesConfig(Section):
    """[storage.s3files]"""

    import_below_kib: int = Field(128, ge=1, le=51_200, description="Files up to this size are brought to the file system's fast storage.")
    expire_days: int = Field(30, ge=1, le=365, description="Data unread for so long leaves the fast storage; the bucket keeps it.")


class StorageConfig(Section):
    """[storage]"""

    kind: Literal["efs", "fsx", "s3files"] = Field("efs", description="Shared file system that every instance mounts.")
    backup: bool = Field(False, description="Daily AWS Backup of the file system (efs).")
    noncurrent_days: int = Field(30, ge=1, le=3650, description="Replaced and deleted objects of the bucket are kept for so long.")
    efs: EfsConfig = EfsConfig()
    fsx: FsxConfig = FsxConfig()
    s3files: S3FilesConfig = S3FilesConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind in ("efs", "fsx", "s3files"):
            if kind != self.kind and kind in self.model_fields_set:
                raise ValueError(f"the section {kind} is given and kind is {self.kind}; remove one of the two")
        if self.backup and self.kind != "efs":
            raise ValueError(f"backup is for kind efs alone; the bucket behind {self.kind} is versioned. Given: kind {self.kind}")
        return self


class ImageConfig(Section):
    """[image]"""

    kind: Literal["dlami", "baked", "ami"] = Field(
        "dlami", description="dlami: AWS's Deep Learning AMI, the server installed at boot. baked: our recipe on it. ami: ami_id."
    )
    ami_line: Literal["base", "pytorch"] = Field(
        "base", description="Line of the Deep Learning AMI: base ages better, pytorch brings its torch."
    )
    version: str = Field("latest", pattern=r"^(latest|ami-[0-9a-f]{8,17})$", description="latest, or a pinned AMI id.")
    ami_id: str | None = Field(None, pattern=r"^ami-[0-9a-f]{8,17}$", description="With kind ami: an image that holds the server.")
    wheelhouse_prefix: Prefix | None = Field(None, description="Prefix of the bucket with wheels to install from, instead of PyPI.")
    schedule: Cron | None = Field(None, description="With kind baked: when a new image is made; none: on demand.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "ami") != (self.ami_id is not None):
            raise ValueError(f"kind ami and ami_id go together. Given: kind {self.kind}, ami_id {self.ami_id}")
        for key in ("ami_line", "version"):
            if self.kind == "ami" and key in self.model_fields_set:
                raise ValueError(f"{key} says which AMI of AWS's to take, and kind ami takes ami_id; remove {key}")
        if self.schedule and self.kind != "baked":
            raise ValueError(f"schedule needs kind baked. Given: {self.kind}")
        return self


class ModelConfig(Section):
    """[model]"""

    source: Literal["embedded", "bucket", "hub"] = Field(
        "embedded",
        description="embedded: SmolLM2-135M, uploaded by the deploy. bucket: put there by infra.push_model. hub: fetched.",
    )
    id: str = Field(
        "smollm2-135m-instruct",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$",
        description="Folder below prefix, or the hub's owner/name.",
    )
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="With source hub: the commit, 40 hexadecimal digits.")
    prefix: Prefix = Field("models/", description="Prefix of the bucket for base models.")
    adapters_prefix: Prefix = Field("adapters/", description="Prefix of the bucket for adapters.")
    hub: bool = Field(False, description="Whether instances may load from the Hugging Face hub at all.")
    hub_owners: tuple[str, ...] = Field((), description="With hub: owners whose adapters a request may name.")
    hub_secret_arn: Arn | None = Field(None, description="With hub: the secret in Secrets Manager that holds the token.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source == "embedded" and self.id != "smollm2-135m-instruct":
            raise ValueError(f'id must be smollm2-135m-instruct with source embedded; for another set source = "bucket". Given: {self.id}')
        if self.source != "embedded" and "id" not in self.model_fields_set:
            raise ValueError(f"id is missing; it names the model of source {self.source}")
        if self.source == "hub":
            if not self.hub:
                raise ValueError("source hub needs hub = true: production does not depend on the hub unless asked to")
            if "/" not in self.id or self.revision is None:
                raise ValueError(f"source hub needs id = owner/name and revision = a commit. Given: {self.id}, {self.revision}")
        elif self.revision is not None:
            raise ValueError(f"revision needs source hub. Given: {self.source}")
        for key in ("hub_owners", "hub_secret_arn"):
            if getattr(self, key) and not self.hub:
                raise ValueError(f"{key} needs hub = true")
        if self.prefix.startswith(self.adapters_prefix) or self.adapters_prefix.startswith(self.prefix):
            raise ValueError(f"prefix and adapters_prefix must not lie in each other. Given: {self.prefix} and {self.adapters_prefix}")
        return self


def _network(key: str, text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"{key} must be an IPv4 range such as 203.0.113.7/32. Given: {text} ({error})") from None
