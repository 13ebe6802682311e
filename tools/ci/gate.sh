#!/bin/sh
# The step of the GitHub Action: runs the gate on KVDRIFT_TARGET and hands on verdict, first failure and report.
# Also of use by hand: KVDRIFT_TARGET=./my-model GITHUB_OUTPUT=out.txt sh tools/ci/gate.sh
set -u
run=${KVDRIFT_OUT:-kvdrift-gate}
set -- --github-summary --junit "${KVDRIFT_JUNIT:-kvdrift.xml}"
[ -z "${KVDRIFT_BASELINE:-}" ] || set -- "$@" --baseline "$KVDRIFT_BASELINE"
if [ -f "$KVDRIFT_TARGET/report.json" ]; then
    run=$KVDRIFT_TARGET
else
    set -- "$@" --scenario "${KVDRIFT_SCENARIO:-decode}" --out "$run"
    [ -z "${KVDRIFT_PROMPTS:-}" ] || set -- "$@" --prompts "$KVDRIFT_PROMPTS"
fi
kvdrift gate "$KVDRIFT_TARGET" "$@"
code=$?
# A run that left no report has no verdict: the outputs stay empty, and the code is red.
if [ -f "$run/report.json" ]; then
    python3 - "$run" >>"$GITHUB_OUTPUT" <<'PYTHON'
import json, sys
view = json.load(open(f"{sys.argv[1]}/report.json", encoding="utf-8"))
first = view.get("first_failure") or {}
text = first.get("text", "") if isinstance(first, dict) else str(first)
print(f"verdict={view['verdict']}\nfirst-failure={' '.join(text.split())}\nreport={sys.argv[1]}/report.html")
PYTHON
fi
exit "$code"
