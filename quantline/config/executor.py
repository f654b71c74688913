"""The section `executor`: which processes do the work of a stage, here or on other machines."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quantline.config.section import Section

# Kind → the fields that it takes besides those that every kind takes.
FIELDS: dict[str, tuple[str, ...]] = {
    "local": (),
    "ray": ("address", "memory_mib"),
    "slurm": ("cluster", "memory_mib", "minutes", "sbatch"),
}
ELSEWHERE = ("address", "cluster", "memory_mib", "minutes", "sbatch")


class Executor(Section):
    """Who does the work of a stage. Nothing here changes a result, so no stage runs again for it.

    A stage that divides its work hands parts of it (items) to workers, through a folder that all of
    them see. One local worker is the stage's own process.
    """

    kind: Literal["local", "ray", "slurm"] = Field(
        default="local",
        description="local: processes of this machine. ray: tasks of a Ray cluster. slurm: jobs of "
        "Slurm, by submitit.",
    )
    workers: int = Field(default=1, ge=1, description="Workers at a time.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of each worker, and the cores that Ray or Slurm reserves for it. null "
        "divides this machine's cores by the workers, which local alone can.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        description="GPUs of each worker. 0 is none for ray and slurm; local workers then share "
        "what there is.",
    )
    attempts: int = Field(
        default=3, ge=1, description="How often an item is tried whose worker was lost."
    )
    memory_mib: int | None = Field(
        default=None, ge=1, description="Memory that is reserved for each worker (ray, slurm)."
    )
    address: str | None = Field(
        default=None,
        description="The cluster (ray): auto, or the head's host:port; null starts Ray here.",
    )
    cluster: Literal["slurm", "local"] = Field(
        default="slurm",
        description="Where submitit starts jobs (slurm): local is this machine, to try it.",
    )
    minutes: int | None = Field(default=None, ge=1, description="Time limit of a job (slurm).")
    sbatch: dict[str, str | int] = Field(
        default_factory=dict,
        description="More options of sbatch by name (slurm), such as partition or account.",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        for name in ELSEWHERE:
            value: Any = getattr(self, name)
            if name not in FIELDS[self.kind] and value != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"executor {self.kind} takes no {name}, found {value!r}; leave it out"
                )
        if self.kind != "local" and self.threads is None:
            raise ValueError(f"executor {self.kind} needs threads: the cluster reserves so many")
        if self.kind == "slurm" and self.minutes is None:
            raise ValueError("executor slurm needs minutes, the time limit of its jobs")
        return self

    @property
    def divides(self) -> bool:
        """Whether work is handed to workers at all."""
        return self.kind != "local" or self.workers > 1
