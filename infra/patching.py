"""Patching of a fleet that boots from the plain image: Ubuntu's security updates on Sunday nights, one instance at a time, no reboot.

Kernel and NVIDIA packages are left alone: a new kernel without its driver's module is an instance without a GPU. They come with the next
image, as everything does where the image is baked; there, nothing of this is made. `Operations` calls it.
"""

from aws_cdk import Tags
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_ssm as ssm
from constructs import Construct

from infra.config import KitConfig

TAG = "PatchGroup"
_LEFT_ALONE = ["linux-*", "nvidia-*", "libnvidia-*", "cuda-*", "libcudnn*", "libnccl*", "datacenter-gpu-manager*"]


class Patching(Construct):
    """`baseline`, `window`. Tags the group's instances; those that run already get the tag when they are replaced."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig, group: autoscaling.AutoScalingGroup) -> None:
        super().__init__(scope, id)
        self._group_name = f"{config.name}-fleet"
        Tags.of(group).add(TAG, self._group_name, apply_to_launched_instances=True)
        self.baseline = self._make_baseline()
        self.window = self._make_window()

    def _make_baseline(self) -> ssm.CfnPatchBaseline:
        rule = ssm.CfnPatchBaseline.RuleProperty(
            approve_after_days=0,  # Ubuntu's packages have no release date that a delay could count from
            compliance_level="HIGH",
            patch_filter_group=ssm.CfnPatchBaseline.PatchFilterGroupProperty(
                patch_filters=[
                    ssm.CfnPatchBaseline.PatchFilterProperty(key="PRODUCT", values=["Ubuntu22.04", "Ubuntu24.04"]),
                    ssm.CfnPatchBaseline.PatchFilterProperty(key="PRIORITY", values=["Required", "Important", "Standard", "Optional"]),
                ]
            ),
        )
        return ssm.CfnPatchBaseline(
            self,
            "Baseline",
            name=self._group_name,
            description="Security updates of Ubuntu; kernel and NVIDIA packages come with the image",
            operating_system="UBUNTU",
            approval_rules=ssm.CfnPatchBaseline.RuleGroupProperty(patch_rules=[rule]),
            approved_patches_enable_non_security=False,
            rejected_patches=_LEFT_ALONE,
            rejected_patches_action="BLOCK",
            patch_groups=[self._group_name],
        )

    def _make_window(self) -> ssm.CfnMaintenanceWindow:
        window = ssm.CfnMaintenanceWindow(
            self,
            "Window",
            name=self._group_name,
            schedule="cron(0 4 ? * SUN *)",
            schedule_timezone="UTC",
            duration=3,
            cutoff=1,
            allow_unassociated_targets=False,
        )
        ours = ssm.CfnMaintenanceWindowTarget(
            self,
            "Target",
            window_id=window.ref,
            resource_type="INSTANCE",
            targets=[ssm.CfnMaintenanceWindowTarget.TargetsProperty(key=f"tag:{TAG}", values=[self._group_name])],
        )
        ssm.CfnMaintenanceWindowTask(
            self,
            "Task",
            window_id=window.ref,
            task_arn="AWS-RunPatchBaseline",
            task_type="RUN_COMMAND",
            priority=1,
            max_concurrency="1",
            max_errors="0",
            targets=[ssm.CfnMaintenanceWindowTask.TargetProperty(key="WindowTargetIds", values=[ours.ref])],
            task_invocation_parameters=ssm.CfnMaintenanceWindowTask.TaskInvocationParametersProperty(
                maintenance_window_run_command_parameters=ssm.CfnMaintenanceWindowTask.MaintenanceWindowRunCommandParametersProperty(
                    parameters={"Operation": ["Install"], "RebootOption": ["NoReboot"]}, timeout_seconds=3600
                )
            ),
        )
        return window
