#!/usr/bin/env bash
# Writes what goes with the program into a folder: completions for three shells, manual pages, and the lines of docs/permissions.md that create
# users and roles.
#
#   packaging/texts.sh target/release/tidegate FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:?the program} folder=${2:?the folder for the texts}

mkdir -p "$folder/completions" "$folder/man" "$folder/permissions"
"$program" completions bash > "$folder/completions/tidegate.bash"
"$program" completions zsh > "$folder/completions/_tidegate"
"$program" completions fish > "$folder/completions/tidegate.fish"
"$program" man --out "$folder/man"

# The blocks of one language in one part of the document, each under its heading; the document's sentences are remarks.
lines_of() {
    awk -v language="$1" -v sign="$2" -v part="$3" '
        function remark(line) { gsub(/`|\*\*|\[|\]\([^)]*\)/, "", line); print (line == "" ? "" : sign " " line); empty = (line == "") }
        /^## / { here = ($0 == "## " part); next }
        !here { next }
        /^```/ { inside = !inside; is_language = ($0 == "```" language); if (!inside) remark(""); next }
        inside && is_language { print; next }
        /^### / { sub(/^### /, "") }
        $0 != "" || !empty { remark($0) }' docs/permissions.md
}
{
    echo "# Users of Valkey, one command a line: take those that you need, and replace each \"secret\" with a password of its own."
    lines_of acl '#' Valkey
} > "$folder/permissions/valkey.acl"
{
    echo "-- Roles of PostgreSQL: take those that you need, and replace each 'secret' with a password of its own."
    lines_of sql -- PostgreSQL
} > "$folder/permissions/postgresql.sql"
