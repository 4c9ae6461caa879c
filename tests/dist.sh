#!/usr/bin/env bash
# What a release packs around the program: everything is in the archive and in the Debian package, and made twice they have the same bytes.
# Of the program that is given, without its debug information. What is missing for a part is said.
#
#   tests/dist.sh target/debug/tidegate
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:?the program}
say() { echo "dist: $*"; }
fail() { say "failed: $*"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if command -v strip > /dev/null; then strip --strip-all -o "$work/tidegate" "$program"; else cp "$program" "$work/tidegate"; fi
program=$work/tidegate

# Whatever differs between two machines: time, umask, language.
(umask 022 && DIST=$work/one packaging/dist.sh archive "$program") > "$work/made"
(umask 077 && LC_ALL=C TZ=Asia/Tokyo DIST=$work/two packaging/dist.sh archive "$program") > /dev/null
archive=$(cat "$work/made")
cmp "$archive" "$work/two/$(basename "$archive")" || fail "the archive differs when it is made again"
name=$(basename "$archive" .tar.gz)
version=$("$program" --version | cut -d ' ' -f 2)
[[ $name =~ ^tidegate-$version-[a-z0-9_]+(-[a-z0-9_]+)+$ ]] || fail "the archive's name has not version and target: $name"

mkdir "$work/unpacked" && tar --extract --gzip --file "$archive" --directory "$work/unpacked"
root=$work/unpacked/$name
"$root/tidegate" --version > /dev/null || fail "the program in the archive does not run"
for file in README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT docs/configuration.md docs/runbooks/TidegateStuck.md systemd/tidegate.service systemd/tidegate.toml; do
    [ -s "$root/$file" ] || fail "the archive lacks $file"
done
# The scripts ask the program that they came with.
completed=$(PATH=$root:$PATH bash -c 'source "$0" && COMP_LINE="tidegate dead redr" COMP_POINT=18 COMP_WORDS=(tidegate dead redr) COMP_CWORD=2 &&
    _tidegate tidegate redr dead && echo "${COMPREPLY[@]}"' "$root/completions/tidegate.bash")
[ "$completed" = redrive ] || fail "in bash a verb does not complete: $completed"
for shell in completions/_tidegate completions/tidegate.fish; do
    grep --quiet "_TIDEGATE_COMPLETE=" "$root/$shell" || fail "$shell does not ask the program"
done
# One manual page for each verb, and each verb of a verb.
for page in tidegate tidegate-run tidegate-dead tidegate-dead-redrive; do
    [ -s "$root/man/$page.1" ] || fail "there is no manual page $page"
done
if command -v man > /dev/null; then
    # man's reader tells of what it does not understand.
    complaints=$(man --warnings --local-file "$root"/man/*.1 2>&1 > /dev/null || true)
    [ -z "$complaints" ] || fail "man: $complaints"
else
    say "skipped: there is no man: its opinion of the manual pages"
fi

# Each line of the document is in the file for its server, and not a word of it is left as a remark.
for pair in "acl valkey.acl" "sql postgresql.sql"; do
    read -r language file <<< "$pair"
    awk -v language="$language" '/^```/ { inside = !inside && $0 == "```" language; next } inside' docs/permissions.md > "$work/lines"
    [ -s "$work/lines" ] || fail "docs/permissions.md has no blocks of $language"
    grep -vE '^(#|--|$)' "$root/permissions/$file" | cmp - "$work/lines" || fail "permissions/$file differs from docs/permissions.md"
done
say "the archive of $(du -h "$archive" | cut -f 1) holds everything, and has the same bytes when it is made again"

if command -v dpkg-deb > /dev/null; then
    package=$(umask 022 && packaging/deb.sh "$program" "$work/one")
    again=$(umask 077 && LC_ALL=C TZ=Asia/Tokyo packaging/deb.sh "$program" "$work/two")
    cmp "$package" "$again" || fail "the package differs when it is made again"
    dpkg-deb --contents "$package" > "$work/contents"
    for file in usr/share/man/man1/tidegate.1.gz usr/share/man/man1/tidegate-dead-redrive.1.gz usr/share/bash-completion/completions/tidegate \
        usr/share/zsh/vendor-completions/_tidegate usr/share/fish/vendor_completions.d/tidegate.fish usr/share/doc/tidegate/permissions/valkey.acl; do
        grep --quiet " ./$file$" "$work/contents" || fail "the package lacks $file"
    done
    say "the package has the same bytes when it is made again"
else
    say "skipped: there is no dpkg-deb: the package"
fi

python=.servers/helm/bin/python
if [ -x $python ]; then
    chart=$(DIRTY=1 DIST=$work/one packaging/dist.sh chart $python)
    touch helm/tidegate/values.yaml
    cmp "$chart" "$(DIRTY=1 DIST=$work/two TZ=Asia/Tokyo packaging/dist.sh chart $python)" || fail "the chart differs when it is made again"
    tar --extract --gzip --file "$chart" --to-stdout tidegate/Chart.yaml | grep --quiet "^appVersion: $version$" || fail "the chart is of another version"
    ! tar --list --gzip --file "$chart" | grep --quiet /ci/ || fail "the chart holds its tests"
    say "the chart has the same bytes when it is made again"
else
    say "skipped: there is no Python with the Helm library (make helm-venv): the chart"
fi

DIST=$work/one packaging/dist.sh checksums > "$work/sums"
(cd "$work/one" && sha256sum --check --quiet SHA256SUMS) || fail "a checksum is wrong"
[ "$(wc -l < "$work/sums")" = "$(find "$work/one" -type f ! -name SHA256SUMS | wc -l)" ] || fail "SHA256SUMS has not every file"

! packaging/dist.sh notes 0.0.0-none 2> "$work/none" || fail "a version without notes is released"
grep --quiet "no section for 0.0.0-none" "$work/none" || fail "it does not say that there are no notes"
packaging/dist.sh notes Unreleased > "$work/notes"
grep --quiet '^- ' "$work/notes" && ! grep --quiet '^## ' "$work/notes" || fail "the notes of a version are empty, or of several"

# Without tools a release names all that is missing, and makes nothing.
mkdir "$work/few" && for tool in bash sed head git dirname env; do ln -s "$(command -v $tool)" "$work/few/"; done
! PATH=$work/few DIST=$work/none-made packaging/dist.sh check "$work/no/python" 2> "$work/missing" || fail "a release is made without tools"
for tool in cargo-auditable cargo-cyclonedx dpkg-deb "the Helm library"; do
    grep --quiet "missing: $tool: " "$work/missing" || fail "it does not say that $tool is missing: $(cat "$work/missing")"
done
say "passed"
