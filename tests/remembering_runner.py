"""A scripted runner that holds programs, as a real one does."""

from __future__ import annotations

from pathlib import Path

from scripted_runner import ScriptedRunner

from steploom.protocol import RunnerOutput, SchedulerOutput


class RememberingRunner(ScriptedRunner):
    """Knows whom it holds."""

    def __init__(self, progress) -> None:
        super().__init__(progress)
        self.resident: list[str] = []
        self.note: Path | None = None

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        self.resident = [run for run in self.resident if run not in output.finished_req_ids]
        self.resident += [new.run_id for new in output.scheduled_new_reqs]
        if output.finished_req_ids and self.note is not None:
            self.note.touch()
        return super().execute(output)

    def rpc_resident(self) -> list[str]:
        return self.resident


def make(config, progress) -> RememberingRunner:
    """``model="note:PATH"``: that file is there once somebody was forgotten."""
    runner = RememberingRunner(progress)
    if config.model.startswith("note:"):
        runner.note = Path(config.model.removeprefix("note:"))
    return runner


class Stubborn(RememberingRunner):
    """Lets nobody go."""

    def execute(self, output: SchedulerOutput) -> RunnerOutput:
        if output.finished_req_ids:
            raise RuntimeError("it will not go")
        return super().execute(output)


def stubborn(config, progress) -> Stubborn:
    return Stubborn(progress)
