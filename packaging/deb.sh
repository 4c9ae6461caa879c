#!/usr/bin/env bash
# Makes a Debian package of a program that is built already, and prints its path. The same program and commit give the same package.
#
#   packaging/deb.sh target/release/tidegate target/debian
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:?the program} folder=${2:?the folder for the package}
command -v dpkg-deb > /dev/null || { echo "deb: dpkg-deb is missing: install dpkg" >&2; exit 69; }
version=$("$program" --version | cut -d ' ' -f 2)
architecture=$(dpkg --print-architecture)
# The newest C library that a symbol of it asks for.
libc=$(grep -aoE 'GLIBC_[0-9.]+' "$program" | sort -uV | tail -n 1 | cut -d _ -f 2)

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || date +%s)}
export SOURCE_DATE_EPOCH
umask 022

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
install -D -m 0755 "$program" "$root/usr/bin/tidegate"
install -D -m 0644 packaging/tidegate.service "$root/lib/systemd/system/tidegate.service"
# Readable for the daemon, which is nobody in particular; it holds no secret.
install -D -m 0644 packaging/tidegate.toml "$root/etc/tidegate/tidegate.toml"
install -d -m 0700 "$root/etc/tidegate/credentials"
for text in README.md CHANGELOG.md docs/configuration.md docs/deploy.md docs/permissions.md; do
    install -D -m 0644 "$text" "$root/usr/share/doc/tidegate/$(basename "$text")"
done
packaging/texts.sh "$program" "$root/texts"
install -D -m 0644 -t "$root/usr/share/man/man1" "$root"/texts/man/*.1
gzip -9n "$root"/usr/share/man/man1/*.1
install -D -m 0644 "$root/texts/completions/tidegate.bash" "$root/usr/share/bash-completion/completions/tidegate"
install -D -m 0644 "$root/texts/completions/_tidegate" "$root/usr/share/zsh/vendor-completions/_tidegate"
install -D -m 0644 "$root/texts/completions/tidegate.fish" "$root/usr/share/fish/vendor_completions.d/tidegate.fish"
install -D -m 0644 -t "$root/usr/share/doc/tidegate/permissions" "$root"/texts/permissions/*
rm -r "$root/texts"
{ echo "Tidegate is licensed under the MIT licence or the Apache License 2.0, at your option."; echo; cat LICENSE-MIT; echo; cat LICENSE-APACHE; } \
    > "$root/usr/share/doc/tidegate/copyright"
mkdir "$root/DEBIAN"
echo /etc/tidegate/tidegate.toml > "$root/DEBIAN/conffiles"
cat > "$root/DEBIAN/control" <<CONTROL
Package: tidegate
Version: $version
Architecture: $architecture
Maintainer: The authors of Tidegate <tidegate@localhost>
Installed-Size: $(du -sk --apparent-size "$root" | cut -f 1)
Depends: libc6 (>= $libc), libgcc-s1, ca-certificates
Section: database
Priority: optional
Description: write-behind for Valkey and PostgreSQL
 Applications count in Valkey because it is fast. Tidegate reads the deltas
 from a stream, coalesces them and adds them to a PostgreSQL table: every
 delta lands exactly once, whatever crashes.
CONTROL
# The service is neither enabled nor started: it has no urls yet. An upgrade restarts one that runs.
cat > "$root/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = configure ] && [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    [ -z "$2" ] || systemctl try-restart tidegate.service
fi
SCRIPT
cat > "$root/DEBIAN/prerm" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    systemctl stop tidegate.service
fi
SCRIPT
cat > "$root/DEBIAN/postrm" <<'SCRIPT'
#!/bin/sh
set -e
if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
if [ "$1" = purge ]; then rm -rf "$DPKG_ROOT/etc/tidegate/credentials"; rmdir "$DPKG_ROOT/etc/tidegate" 2> /dev/null || true; fi
SCRIPT
chmod 0755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm" "$root/DEBIAN/postrm"
mkdir -p "$folder"
package=$folder/tidegate_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$root" "$package" > /dev/null
echo "$package"
