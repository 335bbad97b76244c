"""trainproof and losslint: both judge the log; trainproof also the batches."""

from losslint.checks import run_all_checks
from losslint.parsing import load_run
from trainproof.epoch import check_epoch
from trainproof.integrations import hf
from trainproof.objective import TargetCoverage, check_ignore_index, check_label_alignment
from trainproof.preflight import check_preflight

from tests.zoo.others.tool import Tool, log_file

OBJECTIVE_BATCHES = 32  # `TrainproofCallback(objective_batches=32)`


class Losslint(Tool):
    """Lints the log at each logged step, as `losslint watch` does where a step takes its 5 s or longer."""

    def on_log(self):
        with log_file(self.trainer.state.log_history) as path:
            for finding in run_all_checks(load_run(path)):
                if finding.severity in ("warning", "error"):
                    self.hear(self.step, finding.check, finding.message)


class Trainproof(Tool):
    """`TrainproofCallback()`, which judges the log every 25 steps from 10 logged losses on; `trainproof epoch` on the
    whole log when the run ends; its objective checks. The callback makes those (`objective_check=True`) on 32 batches
    that it reads from the loader before training; its README warns that this can change the order of batches, and it
    refuses streams. Here the same functions hear the first 32 micro-batches as they go by: the run is left alone, and
    streams are judged too. Left out: its wall-clock rule, which on a busy machine would judge the machine.

    `documents`, texts of the training data, and `tokenizer` make its preflight; `loss_shifts` is what its
    documentation wants from a user whose loss is not the model's (None: it looks at the model).
    """

    def __init__(self, trainer, hear, documents=None, tokenizer=None, loss_shifts: bool | None = None):
        super().__init__(trainer, hear)
        self._texts = None if documents is None else [{"text": text} for text in documents]
        self._tokenizer = tokenizer
        self._callback = hf.TrainproofCallback()
        self._objective = Objective(trainer, loss_shifts)

    def on_train_begin(self):
        if self._texts is not None:
            self._hear_all(0, check_preflight(self._texts, tokenizer=self._tokenizer)["findings"])

    def on_micro_batch(self, inputs):
        self._hear_all(*self._objective.hear(inputs))

    def on_log(self):
        trainer = self.trainer
        self._callback.on_log(trainer.args, trainer.state, trainer.control)
        if self._callback.last_checked_step == self.step:
            self._judge_log()

    def on_end(self):
        self._hear_all(*self._objective.judge_coverage())
        if self.trainer.state.log_history:
            self._judge_log()

    def _judge_log(self) -> None:
        with log_file(self.trainer.state.log_history) as path:
            self._hear_all(self.step, check_epoch(path, fmt="hf")["findings"])

    def _hear_all(self, step: int, findings: list[dict]) -> None:
        for finding in findings:
            if finding["level"] in ("WARN", "FAIL"):
                self.hear(step, finding["id"], f"{finding['message']} {finding['evidence']}")


class Objective:
    """trainproof's checks of ignore index, label shift and target coverage, fed with micro-batches as they pass."""

    def __init__(self, trainer, loss_shifts: bool | None):
        self._trainer, self._num_classes = trainer, hf._infer_num_classes(trainer.model)
        self._ignore_index = hf._infer_ignore_index(trainer.model)
        self._loss_shifts = hf._loss_shifts_labels(trainer.model) if loss_shifts is None else loss_shifts
        self._coverage: TargetCoverage | None = TargetCoverage(self._num_classes, self._ignore_index)
        self._num_batches = 0

    def hear(self, inputs: dict) -> tuple[int, list[dict]]:
        """The step that could know, and findings."""
        findings, input_ids, labels = [], inputs.get("input_ids"), inputs.get("labels")
        if self._num_batches == 0:
            findings = check_ignore_index(self._num_classes, self._ignore_index)
            if input_ids is not None and labels is not None:
                findings += check_label_alignment(input_ids, labels, self._ignore_index, self._loss_shifts)
        self._num_batches += 1
        if labels is not None and self._coverage is not None:
            self._coverage.observe(labels)
        step = self._trainer.state.global_step
        return self.judge_coverage() if self._num_batches == OBJECTIVE_BATCHES else (step, findings)

    def judge_coverage(self) -> tuple[int, list[dict]]:
        """Known before training where the callback could have read the loader: data with a length."""
        coverage, self._coverage = self._coverage, None
        step = 0 if hasattr(self._trainer.train_dataset, "__len__") else self._trainer.state.global_step
        return step, coverage.result() if coverage is not None and coverage.n_targets else []
