#!/usr/bin/env bash
# The workflows, judged by those who know: actionlint (with shellcheck for what they run) whether they are right, zizmor whether they leave a
# hole. Both from Python's packages, into the folder that is named; where they cannot be had it says so.
#
#   tests/workflows.sh .servers/workflows
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?the folder for the tools}
say() { echo "workflows: $*"; }
fail() { say "failed: $*"; exit 1; }

if ! cmp --silent tests/workflows.txt "$folder/workflows.txt"; then
    rm -rf "$folder"
    python3 -m venv "$folder" 2> /dev/null || { rm -rf "$folder"; say "skipped: there is no python3 with venv"; exit 0; }
    "$folder/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --requirement tests/workflows.txt \
        || { rm -rf "$folder"; say "skipped: pip cannot install them: no network, or no wheels for this machine"; exit 0; }
    cp tests/workflows.txt "$folder/"
fi

"$folder/bin/actionlint" -shellcheck "$folder/bin/shellcheck" .github/workflows/*.yml || fail "actionlint"
"$folder/bin/zizmor" --offline --quiet --no-progress .github/workflows || fail "zizmor"
# The scripts of this repository, while its tool is here.
"$folder/bin/shellcheck" --severity=warning packaging/*.sh tests/*.sh || fail "shellcheck"
say "passed: actionlint, zizmor and shellcheck have no complaint"
