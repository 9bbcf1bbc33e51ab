"""Jobs as a Slurm job array, through submitit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from harness import hookimpl
from harness.executor import Died, Executor, Handle, Submit
from harness.options import UserError

NO_SUBMITIT = "submitit is not installed: pip install 'inference-harness[slurm]'"
OUT_OF_REQUEUES = "timed-out too many times"  # as submitit says it
KEPT_OUTPUT = 2**16
"""Characters of what a job has printed last."""


@dataclass(frozen=True, kw_only=True)
class Slurm(Executor):
    """Hands jobs to Slurm, as an array.

    In each element of the array a worker process does the work, so that a death costs only what it was at. Shortly
    before its time is up, or when it is preempted, a fit keeps a checkpoint, and the element goes back into the queue
    and on from there. Nodes need this Python environment and the folder of results; what elements print is kept there,
    below ``slurm/``.

    Args:
        cluster: ``local`` starts processes on this machine instead, to try things out.
        minutes: Of an element, after which it is put back into the queue.
        partition, account, qos: As Slurm knows them; its defaults if empty.
        cores: Of each job.
        gpus: Of each job.
        memory_gb: Of each job; Slurm's default if 0.
        at_once: How many elements may run at a time; as many as there is room for if 0.
        requeues: How often an element may run out of time.
        exclusive: Whether an element has its node for itself; only then are seconds of fits comparable.
    """

    supervised: ClassVar[bool] = True

    name: str = "slurm"
    cluster: Literal["slurm", "local"] = "slurm"
    minutes: PositiveInt = 60
    partition: str = ""
    account: str = ""
    qos: str = ""
    cores: PositiveInt = 1
    gpus: NonNegativeInt = 0
    memory_gb: NonNegativeInt = 0
    at_once: NonNegativeInt = 0
    requeues: NonNegativeInt = 100
    exclusive: bool = False

    @property
    def threads(self) -> int | None:
        return self.cores

    @property
    def apart(self) -> bool:
        return self.exclusive and self.cluster == "slurm"

    @contextmanager
    def connected(self, folder: Path) -> Iterator[Submit]:
        try:
            from submitit import AutoExecutor
        except ImportError:
            raise UserError(NO_SUBMITIT) from None
        try:
            engine = AutoExecutor(folder / "slurm", cluster=self.cluster, slurm_max_num_timeout=self.requeues)
        except RuntimeError as error:
            raise UserError(f"slurm: {error}; slurm[cluster=local] starts processes on this machine") from None
        engine.update_parameters(**self._parameters())

        def submit(work: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Handle]:
            return [_Handle(job) for job in engine.map_array(_Requeued(work), tasks)]

        yield submit

    def _parameters(self) -> dict[str, Any]:
        texts = {"partition": self.partition, "account": self.account, "qos": self.qos}
        found: dict[str, Any] = {
            "name": "inference-harness",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cores,
            "gpus_per_node": self.gpus,
            "mem_gb": self.memory_gb or None,
            **{f"slurm_{name}": text for name, text in texts.items() if text},
            "slurm_array_parallelism": self.at_once or 256,
            "slurm_exclusive": self.exclusive or None,
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class _Requeued:
    """What an element calls; submitit asks it what is to be called when it goes back into the queue."""

    work: Callable[[Any], Any]

    def __call__(self, task: Any) -> Any:
        return self.work(task)

    def checkpoint(self, task: Any) -> Any:
        """The same: fits go on from their own checkpoints, which they keep when their process is ended."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


class _Handle:
    def __init__(self, job: Any) -> None:
        self.job = job

    def done(self) -> bool:
        return self.job.done()

    def result(self) -> Any:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            found = self.job.result()
        except (FailedJobError, UncompletedJobError) as error:
            raise self._death(str(error)) from None
        for path in (self.job.paths.submitted_pickle, self.job.paths.result_pickle):
            path.unlink(missing_ok=True)
        return found

    def _death(self, told: str) -> Died:
        """What is out of requeues ends by an exception of submitit's, and its state does not say why."""
        state = str(self.job.state)
        status = "timeout" if "TIMEOUT" in state or OUT_OF_REQUEUES in told else "killed"
        return Died(
            f"its Slurm job {self.job.job_id} ended as {state}", (self.job.stderr() or "")[-KEPT_OUTPUT:], status
        )

    def cancel(self) -> None:
        with suppress(Exception):
            self.job.cancel(check=False)


@hookimpl
def harness_executors() -> list[Slurm]:
    return [Slurm()]
