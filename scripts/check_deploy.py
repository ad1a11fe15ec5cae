"""What check-deploy.sh wants to know about deploy/ and no ready-made checker tells.

    python3 scripts/check_deploy.py syntax|configuration|metrics|alerts|links|dashboard-rules

Every check prints one finding a line and ends with 1 if there is any.
"""

import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "pgtandem.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
METRIC = re.compile(r"\bpgtandem_[a-z][a-z_]*")
# The series that a histogram consists of.
HISTOGRAMS = {"pgtandem_apply_batch_changes", "pgtandem_apply_batch_duration_seconds"}
HISTOGRAM_SERIES = re.compile(r"_(bucket|sum|count)$")


def base_name(series):
    """The metric that a series belongs to."""
    metric = HISTOGRAM_SERIES.sub("", series)
    return metric if metric in HISTOGRAMS else series


def metrics_in(text):
    return {base_name(name) for name in METRIC.findall(text)}


def promised_metrics():
    return set((DEPLOY / "metrics.txt").read_text().split())


def alert_rules():
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries():
    """(where, PromQL) of every panel, annotation and variable of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']!r} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield f"annotation {annotation['name']!r}", annotation["expr"]


def syntax():
    for path in sorted(DEPLOY.rglob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            yield f"{path.relative_to(ROOT)}: {error}"
    for path in sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]):
        try:
            documents = list(yaml.safe_load_all(path.read_text()))
        except yaml.YAMLError as error:
            yield f"{path.relative_to(ROOT)}: {error}"
            continue
        if not documents or None in documents:
            yield f"{path.relative_to(ROOT)}: an empty document"
    yield from compose_files()
    yield from panel_findings()


def compose_files():
    """Every file that compose.yaml mounts is in the repository."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith(".") and not (DEPLOY / source).is_file():
                yield f"deploy/compose.yaml: service {name} mounts {source}, which is no file"
            elif not source.startswith(".") and source not in compose["volumes"]:
                yield f"deploy/compose.yaml: service {name} mounts the volume {source}, which is not declared"


def panel_findings():
    """Ids are unique, no panel covers another, each says what it shows."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken = {}
    ids = set()
    for panel in panels:
        title = panel["title"]
        if panel["id"] in ids:
            yield f"dashboard: panel {title!r} has the id of another"
        ids.add(panel["id"])
        if panel["type"] != "row" and not panel.get("description"):
            yield f"dashboard: panel {title!r} has no description"
        place = panel["gridPos"]
        if place["x"] + place["w"] > 24:
            yield f"dashboard: panel {title!r} is wider than the page"
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), title)
                if other != title:
                    yield f"dashboard: panels {title!r} and {other!r} overlap"
                    return


def known_keys():
    """section → keys, from the annotated example; a key that is commented out counts too."""
    sections = {}
    section = None
    for line in (ROOT / "config" / "pgtandem.toml").read_text().splitlines():
        if header := re.match(r"#?\s*\[([a-z]+)\]\s*(#|$)", line):
            section = sections.setdefault(header[1], set())
        elif section is not None and (key := re.match(r"#?\s*([a-z_]+)\s*=", line)):
            section.add(key[1])
    return sections


def configuration():
    if not (ROOT / "config" / "pgtandem.toml").is_file():
        yield "config/pgtandem.toml, which names every key, is missing"
        return
    sections = known_keys()
    config_map = yaml.safe_load((DEPLOY / "kubernetes" / "configmap.yaml").read_text())
    section = None
    for line in config_map["data"]["pgtandem.toml"].splitlines():
        if header := re.match(r"\[([a-z]+)\]", line):
            section = header[1]
        elif (key := re.match(r"([a-z_]+)\s*=", line)) and key[1] not in sections.get(section, ()):
            yield f"deploy/kubernetes/configmap.yaml: no key {section}.{key[1]}"
    variables = {f"PGTANDEM_{s}_{k}".upper() for s, keys in sections.items() for k in keys}
    # Not the daemon's configuration: compose.yaml's own.
    variables.add("PGTANDEM_IMAGE")
    files = [ROOT / "Dockerfile", ROOT / "docs" / "runbook.md", *sorted(p for p in DEPLOY.rglob("*") if p.is_file())]
    for path in files:
        for variable in sorted(set(re.findall(r"\bPGTANDEM_[A-Z_]*[A-Z]\b", path.read_text())) - variables):
            yield f"{path.relative_to(ROOT)}: no key of the configuration is {variable}"


def metrics():
    promised = promised_metrics()
    dashboard = set().union(*(metrics_in(query) for _, query in dashboard_queries()))
    rules = metrics_in(ALERTS.read_text()) | metrics_in((DEPLOY / "prometheus" / "recording.yml").read_text())
    rules |= metrics_in((DEPLOY / "prometheus" / "alerts_test.yml").read_text())
    documented = set(re.findall(r"^### `(pgtandem_[a-z_]+)", (ROOT / "docs" / "metrics.md").read_text(), re.M))
    for name in sorted(dashboard - promised):
        yield f"the dashboard uses {name}, which is not in deploy/metrics.txt"
    for name in sorted(rules - promised):
        yield f"the rules or their tests use {name}, which is not in deploy/metrics.txt"
    for name in sorted(promised - dashboard):
        yield f"{name} is on no panel of the dashboard"
    for name in sorted(promised ^ documented):
        yield f"{name} is in only one of deploy/metrics.txt and docs/metrics.md"


def anchors(path):
    """The anchors that a Markdown file's headings get, as code hosts make them."""
    for heading in re.findall(r"^#+ (.+)$", path.read_text(), re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def alerts():
    sections = set(anchors(ROOT / "docs" / "runbook.md"))
    tests = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    for rule in alert_rules():
        name = rule["alert"]
        if rule["labels"].get("severity") not in {"critical", "warning", "info"}:
            yield f"{name}: severity is none of critical, warning, info"
        for annotation in ("summary", "description", "runbook_url"):
            if not rule["annotations"].get(annotation):
                yield f"{name}: no {annotation}"
        if rule["annotations"].get("runbook_url") != f"docs/runbook.md#{name.lower()}":
            yield f"{name}: runbook_url is not docs/runbook.md#{name.lower()}"
        if name.lower() not in sections:
            yield f"{name}: docs/runbook.md has no such section"
        if f'alertname="{name}"' not in tests:
            yield f"{name}: no test in which it fires"
    known = {rule["alert"] for rule in alert_rules()}
    headings = re.findall(r"^#+ (Pgtandem\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.M)
    for name in sorted(set(headings) - known):
        yield f"docs/runbook.md: a section for {name}, which is no alert"


def links():
    """Relative links of the documents lead to a file, and to a heading of it."""
    for document in (ROOT / "docs" / "runbook.md", ROOT / "docs" / "metrics.md", DEPLOY / "README.md"):
        for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", document.read_text()):
            file, _, anchor = link.partition("#")
            target = (document.parent / file).resolve() if file else document
            if not target.exists():
                yield f"{document.relative_to(ROOT)}: {link} leads nowhere"
            elif anchor and anchor not in set(anchors(target)):
                yield f"{document.relative_to(ROOT)}: {link} names no heading there"


def dashboard_rules():
    """Prints a rule file with each query of the dashboard, Grafana's variables filled in."""
    rules = [
        {"record": f"dashboard:query_{number}", "labels": {"where": where}, "expr": filled(query)}
        for number, (where, query) in enumerate(dashboard_queries())
    ]
    yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}, sys.stdout)


def filled(query):
    for variable, value in (("$__rate_interval", "1m"), ("$move", ".*"), ("$instance", ".*")):
        query = query.replace(variable, value)
    return query


CHECKS = {check.__name__: check for check in (syntax, configuration, metrics, alerts, links)}


def main(arguments):
    if arguments == ["dashboard-rules"]:
        dashboard_rules()
        return 0
    if len(arguments) != 1 or arguments[0] not in CHECKS:
        print(__doc__, file=sys.stderr)
        return 2
    findings = list(CHECKS[arguments[0]]())
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
