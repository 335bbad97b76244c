"""What the measurements say of each class: verdicts, faults, summary; results.json holds all of it."""

import datetime
import json
import os
from pathlib import Path

from tests.audit.exceptions import BY_DESIGN
from tests.audit.faults import FAULTS
from tests.audit.pool import versions

RESULTS = Path(__file__).parent / "results.json"
VERDICTS = ("pass", "fault", "open", "not audited")
DOCUMENTS = ("kept apart", "partly", "not kept apart", "no position_ids")


def summarize(reports: list[dict], confirmed: dict[str, dict[str, str]], seconds: float) -> dict:
    """`confirmed`: of `faults.confirm`. A fault is listed for the classes where audit and script both found it."""
    faults = list_faults(reports, confirmed)
    found = {name: [fault["name"] for fault in faults if name in fault["classes"]] for name in names_of(reports)}
    classes = [judge_class(report, found[report["name"]]) for report in reports]
    gaps = [f"{report['name']}: {gap}" for report in reports for gap in report["disagreements"]]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
        "minutes": round(seconds / 60, 1),
        "processor_minutes": round(sum(report["seconds"] for report in reports) / 60, 1),
        "summary": count(classes, faults),
        "faults": faults,
        "classes": classes,
        "disagreements": gaps,
    }


def names_of(reports: list[dict]) -> list[str]:
    return [report["name"] for report in reports]


def list_faults(reports: list[dict], confirmed: dict[str, dict[str, str]]) -> list[dict]:
    listed = []
    for fault in FAULTS:
        measured = {report["name"]: fault.evidence(report["results"]) for report in reports}
        both = {
            name: {"measured": evidence, "confirmed": confirmed[fault.name][name]}
            for name, evidence in measured.items()
            if evidence and name in confirmed.get(fault.name, {})
        }
        if both:
            about = {"name": fault.name, "title": fault.title, "upstream": fault.upstream or None}
            listed.append(about | {"classes": both})
    return listed


def judge_class(report: dict, faults: list[str]) -> dict:
    row = {"class": report["name"], "model_type": report["model_type"], "kind": report.get("kind")}
    row |= {"parameters": report.get("parameters"), "faults": faults}
    if "problem" in report:
        return row | {"verdict": "not audited", "evidence": [report["problem"]], "notes": []}
    explained = {fault.check for fault in FAULTS if fault.name in faults} | consequences(faults)
    evidence, notes = [], []
    for check, status, where, detail in merge(report["results"]):
        line = f"{check} ({where}): {detail}"
        design = BY_DESIGN.get((report["name"], check))
        if check == "documents" or status == "limit" or design:
            notes += [f"{line} (by design: {design})" if design else line]
        elif status == "n/a" and check == "build":
            notes += [f"no sdpa: {detail}"]
        elif status in ("fault", "unclear", "error") and check not in explained:
            evidence += [line]
    verdict = "fault" if faults else "open" if evidence else "pass"
    return row | {"verdict": verdict, "documents": documents_of(report), "evidence": evidence, "notes": notes}


def consequences(faults: list[str]) -> set[str]:
    """Checks that fail for the reason of a fault that is listed."""
    follow = {"labels_not_shifted": {"trainer"}, "num_items_ignored": {"trainer"}}
    follow |= {"generation_positions": {"static"}, "buckets_of_later_positions": {"cache", "padding", "static"}}
    follow["sdpa_without_mask_not_causal"] = {"cache", "documents", "equals_eager", "padding", "static"}
    return set().union(*(follow.get(fault, set()) for fault in faults))


def merge(results: dict) -> list[tuple[str, str, str, str]]:
    """Check, status, settings and detail of all that is no pass; equal statuses of a check in one line."""
    merged: dict[tuple[str, str], list] = {}
    for implementation, settings in results.items():
        for setting, checks in settings.items():
            for check, (status, detail) in checks.items():
                if status != "pass" and detail:
                    merged.setdefault((check, status), [[], detail])[0].append(f"{implementation} {setting}")
    return [(check, status, ", ".join(where), detail) for (check, status), (where, detail) in merged.items()]


def documents_of(report: dict) -> str:
    """Whether packed documents are kept apart, in every attention implementation."""
    packed = [settings["packed"]["documents"] for settings in report["results"].values() if "packed" in settings]
    statuses = {status for status, _ in packed}
    if statuses == {"pass"}:
        return "kept apart"
    if "fault" in statuses or "unclear" in statuses:
        return "partly"
    return "not kept apart" if "limit" in statuses else "no position_ids" if "n/a" in statuses else "not measured"


def count(classes: list[dict], faults: list[dict]) -> dict:
    counts = {verdict: sum(row["verdict"] == verdict for row in classes) for verdict in VERDICTS}
    documents = {name: sum(row.get("documents") == name for row in classes) for name in DOCUMENTS}
    new = [fault for fault in faults if not fault["upstream"]]
    kinds = {"faults": len(faults), "new_faults": len(new)}
    return {"classes": len(classes)} | counts | kinds | {"documents": documents}


def write_results(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
