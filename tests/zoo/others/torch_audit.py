"""torch-audit: rules on weights, gradients, inputs, layers and the optimizer's settings."""

from torch_audit import Auditor, Finding, Phase, Severity
from torch_audit.context import AuditContext, AuditState
from torch_audit.validators.builtin.data import DataValidator

from tests.zoo.others.tool import Tool


class TorchAudit(Tool):
    """Its documented phases at their places in a Trainer's step: static and init before training, the rules on data
    and layers around each forward pass, those on gradients after each backward pass, those on weights after each
    step of the optimizer. On every step ("set to 1 to audit every step"): its default, one step in 1000, is longer
    than any run here. `autopatch()` would leave out the backward phase and judge the guards' probes as well, so hooks
    are on the layers only while a micro-batch is trained on.

    Left out: the TA2xx rules, which its README calls hardware and performance hints.
    """

    def __init__(self, trainer, hear):
        super().__init__(trainer, hear)
        self._auditor: Auditor | None = None

    def on_train_begin(self):
        # The optimizer inside accelerate's: a rule asks for its type.
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        self._auditor = Auditor(self.trainer.model, optimizer=optimizer, every_n_steps=1)
        self._judge(Phase.STATIC, self.step)
        self._judge(Phase.INIT, self.step)

    def on_micro_batch(self, inputs):
        self._auditor.attach()
        context = self._context(Phase.FORWARD, inputs)
        for validator in self._auditor.validators:
            validator.on_phase_start(context)
        self._judge(Phase.FORWARD, self.step, inputs, of_data=True)

    def on_backward(self, inputs, loss):
        self._auditor.detach()
        self._judge(Phase.FORWARD, self.step + 1, inputs, of_data=False)
        self._judge(Phase.BACKWARD, self.step + 1, inputs)

    def on_optimizer_step(self):
        self._judge(Phase.OPTIMIZER, self.step + 1)  # Trainer has not counted this step yet

    def on_end(self):
        if self._auditor is not None:
            self._auditor.detach()  # of a run that broke in a micro-batch

    def _judge(self, phase: Phase, step: int, inputs=None, of_data: bool | None = None) -> None:
        validators = self._auditor.validators
        if of_data is not None:
            validators = [each for each in validators if isinstance(each, DataValidator) == of_data]
        self._auditor.runner.run_step(self._context(phase, inputs), validators=validators)
        for finding in self._auditor.pop_new_findings():
            self._hear(finding, step)

    def _context(self, phase: Phase, inputs) -> AuditContext:
        model, optimizer = self._auditor.model, self._auditor.optimizer
        return AuditContext(AuditState(model=model, step=self.step, phase=phase, batch=inputs, optimizer=optimizer))

    def _hear(self, finding: Finding, step: int) -> None:
        if finding.rule_id == "TA000":  # a rule of its own crashed
            raise RuntimeError(finding.message)
        if finding.severity >= Severity.WARN and not finding.rule_id.startswith("TA2"):
            where = finding.module_path or ""
            self.hear(step, finding.rule_id, f"{where} {finding.message}".strip())
