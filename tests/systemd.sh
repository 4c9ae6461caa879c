#!/usr/bin/env bash
# The Debian package and the unit in it: the package is installed into a folder of its own, upgraded with a changed configuration, removed
# and purged; the unit is verified and its exposure judged by systemd. What is missing for a part is said.
#
#   tests/systemd.sh target/debug/tidegate
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:?the program}
# systemd's verdict on the unit, 0 (safe) to 100 (unsafe): `systemd-analyze security` prints a tenth of it.
MOST_EXPOSED=15

say() { echo "systemd: $*"; }
fail() { say "failed: $*"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if command -v dpkg-deb > /dev/null; then
    package=$(packaging/deb.sh "$program" "$work")
    root=$work/root
    mkdir -p "$root/var/lib/dpkg/info" "$root/var/lib/dpkg/updates" "$root/var/lib/dpkg/triggers"
    touch "$root/var/lib/dpkg/status"
    # Into a folder of its own, as whoever runs the test, with nothing that it depends on: so its scripts run outside of that folder.
    package_manager() {
        DPKG_FRONTEND_LOCKED=1 dpkg --root="$root" --log=/dev/null --force-not-root --force-depends --force-script-chrootless --force-confold "$@" \
            > "$work/dpkg.log" 2>&1 || { cat "$work/dpkg.log"; fail "dpkg $*"; }
    }
    package_manager --install "$package"
    "$root/usr/bin/tidegate" --version | grep -q "^tidegate [0-9]" || fail "the installed program does not run"
    [ "$(stat -c %a "$root/etc/tidegate/credentials")" = 700 ] || fail "others can look into the folder with the credentials"
    VALKEY_URL=valkey://localhost DATABASE_URL=postgres://localhost/app \
        "$root/usr/bin/tidegate" --config "$root/etc/tidegate/tidegate.toml" check > /dev/null || fail "the configuration of the package is not valid"
    echo '# mine' >> "$root/etc/tidegate/tidegate.toml"
    echo valkey://localhost > "$root/etc/tidegate/credentials/valkey-url"
    package_manager --install "$package"
    grep -q '^# mine' "$root/etc/tidegate/tidegate.toml" || fail "an upgrade has replaced the configuration"
    package_manager --remove tidegate
    [ ! -e "$root/usr/bin/tidegate" ] && [ -e "$root/etc/tidegate/credentials/valkey-url" ] || fail "removing takes too little or too much"
    package_manager --purge tidegate
    [ ! -e "$root/etc/tidegate" ] || fail "a purge leaves the configuration"
    say "the package of $(du -h "$package" | cut -f 1) was installed, upgraded, removed and purged"
else
    say "skipped: there is no dpkg-deb: the package"
fi

if command -v systemd-analyze > /dev/null; then
    # The unit names the installed program; here it is the one that was built.
    sed "s|/usr/bin/tidegate |$(realpath "$program") |" packaging/tidegate.service > "$work/tidegate.service"
    complaints=$(systemd-analyze verify "$work/tidegate.service" 2>&1 | grep tidegate.service || true)
    [ -z "$complaints" ] || fail "$complaints"
    systemd-analyze security --offline=true --threshold=$MOST_EXPOSED --no-pager "$work/tidegate.service" > "$work/security" \
        || { grep -F '✗' "$work/security"; fail "the unit is exposed more than $MOST_EXPOSED"; }
    say "the unit is verified; $(tail -n 1 "$work/security" | sed 's/^[^A-Za-z]*//')"
else
    say "skipped: there is no systemd-analyze: the unit"
fi
say "passed"
