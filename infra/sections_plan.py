"""[plan] of the configuration: what the deployment is to hold, for the planner (`infra.plan`). Nothing is made from it."""

from typing import Self

from pydantic import Field, model_validator

from infra.sections import Section


class PlanConfig(Section):
    """[plan]"""

    config_file: str | None = Field(
        None, description="The model's config.json, or its folder, from the repository's root; none: model.id's of sizing/models.toml."
    )
    adapters: int = Field(1, ge=0, le=100_000, description="Adapters on a GPU at once; others wait on the host or disk.")
    rank: int = Field(16, ge=1, le=4096, description="Their rank.")
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1, description="Linears that they target, by the last part of the name.")
    adapter_bytes: int | None = Field(None, ge=1, description="What one takes, where it was measured; none: from rank and targets.")
    concurrency: int = Field(1, ge=1, le=100_000, description="Sequences that run at once, of one instance.")
    prompt_tokens: int = Field(256, ge=1, description="Tokens of a prompt.")
    output_tokens: int = Field(128, ge=1, description="Tokens of an answer.")
    variants: int = Field(5, ge=1, le=100_000, description="Variants of the model that would have an instance each otherwise.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adapter_bytes is not None and self.model_fields_set & {"rank", "targets"}:
            raise ValueError("adapter_bytes is measured and rank and targets are arithmetic; remove one of the two")
        return self
