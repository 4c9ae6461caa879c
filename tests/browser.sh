#!/bin/sh
# Looks for a Chromium and installs what drives it into the folder that is named; prints variables for `make console-test`. Where one of them
# cannot be had it prints why.
set -eu

folder=$1
source=$(dirname "$0")/../lab/browser

missing() { printf "export %s_MISSING='%s'\n" "$1" "$2"; }

chromium=${TIDEGATE_CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome-stable || command -v google-chrome || true)}
if [ -n "$chromium" ]; then
    printf "export TIDEGATE_CHROMIUM='%s'\n" "$chromium"
else
    missing TIDEGATE_CHROMIUM "there is no Chromium (Debian: the package chromium), and TIDEGATE_CHROMIUM names none"
fi

if ! command -v npm > /dev/null || ! command -v node > /dev/null; then
    missing TIDEGATE_BROWSER "there is no node with npm"
    exit 0
fi
mkdir -p "$folder"
if ! cmp -s "$source/package-lock.json" "$folder/package-lock.json" || [ ! -d "$folder/node_modules" ]; then
    cp "$source/package.json" "$source/package-lock.json" "$folder/"
    (cd "$folder" && npm ci --silent --no-fund --no-audit >&2) || {
        rm -rf "$folder"
        missing TIDEGATE_BROWSER "npm cannot install playwright-core"
        exit 0
    }
fi
cp "$source/console.mjs" "$folder/"
printf "export TIDEGATE_BROWSER='%s'\n" "$(cd "$folder" && pwd)"
