"""The six steps, in order. Each module has what one step checks, and makes lines of the table of it."""

from rehearse.steps.calls import call
from rehearse.steps.clean_up import destroy
from rehearse.steps.failures import lose_instances
from rehearse.steps.first_deploy import deploy
from rehearse.steps.instances import boot
from rehearse.steps.limits import mark
from rehearse.steps.redeploys import deploy_again

STEPS = [deploy, boot, call, lose_instances, deploy_again, mark, destroy]
