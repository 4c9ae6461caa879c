#!/usr/bin/env bash
# The documents as a site, by mdBook, of the same Markdown: target/site/html. Its chapters are those of the table in README.md.
#
#   SITE_SOURCE   where the code can be read, such as https://HOST/OWNER/NAME/blob/main: links to files that are no documents lead there
set -euo pipefail
cd "$(dirname "$0")/.."

mdbook --version > /dev/null 2>&1 || { echo "mdbook is missing: make site-tools" >&2; exit 69; }
site=target/site
rm -rf $site
mkdir -p $site/src
git ls-files README.md ARCHITECTURE.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs | while read -r file; do install -D -m 0644 "$file" "$site/src/$file"; done

# Folders have a page that lists what is in them.
for folder in runbooks schemas; do
    {
        printf '# %s\n\n' "${folder^}"
        for file in docs/"$folder"/*; do name=${file##*/}; echo "- [${name%.*}]($name)"; done
    } > "$site/src/docs/$folder/README.md"
done
{
    echo '# Summary'
    echo
    echo '[Tidegate](README.md)'
    # A row of the table is a part, and each of its links a chapter.
    sed -n 's/^| \*\*\(.*\)\*\* | \(.*\) |$/\n# \1\n\n\2/p' README.md | sed 's/), \[/)\n[/g' \
        | sed -E 's#^\[(.)(.*)\]\((docs/(runbooks|schemas))/?\)#- [\u\1\2](\3/README.md)#; s#^\[(.)#- [\u\1#'
    echo
    echo '---'
    echo
    for runbook in docs/runbooks/*.md; do echo "[$(basename "$runbook" .md)]($runbook)"; done
} > $site/src/SUMMARY.md
# The page of README.md is the index.
find $site/src -name '*.md' -exec sed -i 's#](\.\./README\.md#](../index.html#g' {} +
if [ -n "${SITE_SOURCE:-}" ]; then
    find $site/src -name '*.md' -exec sed -i -E "s#\]\((\.\./)*((src|tests|lab|helm|migrations|packaging|\.github|deny\.toml)(/[^)]*)?)\)#](${SITE_SOURCE%/}/\2)#g" {} +
fi

cat > $site/book.toml <<'BOOK'
[book]
title = "Tidegate"
description = "Write-behind for Valkey and PostgreSQL: every delta lands exactly once, whatever crashes"
language = "en"

[build]
build-dir = "html"
create-missing = false

[output.html]
no-section-label = true
smart-punctuation = false
BOOK
mdbook build $site
echo "$site/html/index.html"
