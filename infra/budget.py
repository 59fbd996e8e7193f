"""The budget: warns when the account's month costs more than was meant. `Observability` makes it with observability.monthly_budget_usd.

It counts the whole account: a filter by tag would count nothing until somebody has activated the tag for cost allocation.
"""

from aws_cdk import aws_budgets as budgets
from constructs import Construct

from infra.config import KitConfig

_WARNINGS = (("ACTUAL", 80), ("ACTUAL", 100), ("FORECASTED", 100))


class Budget(Construct):
    """`budget`. The configuration promises an address to write to."""

    def __init__(self, scope: Construct, id: str, *, config: KitConfig) -> None:
        super().__init__(scope, id)
        settings = config.observability
        assert settings.monthly_budget_usd and settings.alarm_email
        reader = budgets.CfnBudget.SubscriberProperty(address=settings.alarm_email, subscription_type="EMAIL")
        warnings = [
            budgets.CfnBudget.NotificationWithSubscribersProperty(
                notification=budgets.CfnBudget.NotificationProperty(
                    comparison_operator="GREATER_THAN", notification_type=kind, threshold=percent, threshold_type="PERCENTAGE"
                ),
                subscribers=[reader],
            )
            for kind, percent in _WARNINGS
        ]
        self.budget = budgets.CfnBudget(
            self,
            "Budget",
            budget=budgets.CfnBudget.BudgetDataProperty(
                budget_type="COST",
                time_unit="MONTHLY",
                budget_limit=budgets.CfnBudget.SpendProperty(amount=settings.monthly_budget_usd, unit="USD"),
            ),
            notifications_with_subscribers=warnings,
        )
