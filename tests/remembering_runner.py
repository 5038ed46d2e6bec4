"""A scripted runner that holds programs, as a real one does."""

from __future__ import annotations

from scripted_runner import ScriptedRunner

from steploom.protocol import RunnerOutput, SchedulerOutput


class RememberingRunner(ScriptedRunner):
    """Knows whom it holds."""

    def __init__(self, progress) -> None:
        super().__init__(progress)
        self.resident: list[str] = []

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        self.resident = [run for run in self.resident if run not in output.finished_req_ids]
        self.resident += [new.run_id for new in output.scheduled_new_reqs]
        return super().execute(output)

    def rpc_resident(self) -> list[str]:
        return self.resident


def make(config, progress) -> RememberingRunner:
    return RememberingRunner(progress)
