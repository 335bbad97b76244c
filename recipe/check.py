"""`check`: everything up to the first step, with all probes, and no training."""

import tempfile
import textwrap
from dataclasses import asdict

from recipe.arguments import Config
from recipe.guards import FINDING_IDS, Finding
from recipe.guards.session import PreflightDone
from recipe.train import assemble, open_run


def run_check(config: Config) -> dict:
    """Build the run in a temporary directory, take its first micro-batch, and run the probes on it.

    Returns `judged` (ids), `findings`, `cannot_judge` and `not_applicable` (id -> reason), `needs_training` (ids that
    only a training can judge), and `exit_code`: 3 if a finding is an error.
    """
    with tempfile.TemporaryDirectory(prefix="recipe-check-") as folder:
        config.training.output_dir = folder
        run = assemble(config, open_run(config))
        run.guards.only_check = True
        try:
            run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        except PreflightDone:
            pass
        finally:
            run.guards.on_train_end(run.trainer.args, run.trainer.state, run.trainer.control)
    guards = run.guards
    unjudged = guards.cannot_judge.keys() | guards.not_applicable.keys()
    return {
        "judged": sorted(guards.judged - guards.disabled),
        "findings": [asdict(finding) for finding in guards.findings],
        "cannot_judge": guards.cannot_judge,
        "not_applicable": guards.not_applicable,
        "needs_training": sorted(set(FINDING_IDS) - guards.judged - unjudged - guards.disabled),
        "disabled": sorted(guards.disabled),
        "exit_code": 3 if any(finding.severity == "error" for finding in guards.findings) else 0,
    }


def format_check(result: dict) -> str:
    """For people: a line per id, findings last."""
    found = [Finding(**finding) for finding in result["findings"]]
    clear = [name for name in result["judged"] if name not in {finding.id for finding in found}]
    lines = [f"clear           {name}" for name in clear]
    for key, words in (("not_applicable", "not applicable "), ("cannot_judge", "cannot judge   ")):
        lines += [f"{words} {name}: {reason}" for name, reason in sorted(result[key].items())]
    waiting = textwrap.wrap(", ".join(result["needs_training"]), 100)
    lines += [f"{'needs training' if number == 0 else '':<15} {names}" for number, names in enumerate(waiting)]
    lines += [f"{finding.severity:<15} {finding.log_line()}" for finding in found]
    alarms = sum(finding.severity != "info" for finding in found)
    lines.append(f"{len(result['judged'])} judged, {alarms} of them with a warning or error")
    return "\n".join(lines)
