"""A public report and the two runs that are made of it."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.zoo.pool import Task
from tests.zoo.run import Run
from tests.zoo.setting import Setting

SHORT = Setting(steps=60)
UNTIED = SHORT.changed(sizes={"tie_word_embeddings": False})


@dataclass(frozen=True)
class Report:
    """`threads`: of GitHub, `owner/name#number`. `says`: the report in a sentence. `run`: changes a `Run` to what the
    report describes, and `beside` to the run next to it; their docstrings' first lines are shown.

    `names`: the ids that name the fault. With a fault in `run`, `beside` is its healthy twin. With `healthy`, `run` is
    right and must be silent, and `beside` is the same training with a fault, which shows that silence is not for want
    of judging. `missed`: why it is not judged right, where it is not.
    """

    name: str
    threads: tuple[str, ...]
    says: str
    run: Callable[[Run], None]
    beside: Callable[[Run], None]
    names: tuple[str, ...]
    setting: Setting = SHORT
    healthy: bool = False
    missed: str = ""

    @property
    def tasks(self) -> tuple[Task, Task]:
        both = (self.setting.changed(change=change) for change in (self.run, self.beside))
        return tuple(Task(setting, with_others=False) for setting in both)

    @property
    def what(self) -> tuple[str, str]:
        return tuple((change.__doc__ or "").strip().split("\n")[0] for change in (self.run, self.beside))

    def judge(self, record: dict, beside: dict) -> str:
        """`right`, or what is not. Information is neither an alarm nor a catch."""
        faulty, healthy = (beside, record) if self.healthy else (record, beside)
        if alarms(healthy):
            return "false alarm"
        if not alarms(faulty):
            return "missed"
        return "right" if alarms(faulty)[0]["id"] in self.names else "named otherwise"


def alarms(record: dict) -> list[dict]:
    return [finding for finding in record["findings"] if finding["severity"] != "info"]
