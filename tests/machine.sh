#!/usr/bin/env bash
# The Debian package on a machine with systemd, as docs/deploy.md has it: installed, started, killed, reloaded, hung, upgraded, removed, while increments come
# in; in the end every count is compared. The machine is a container of the Docker engine that is there; where there is none it says so and ends well.
#
#   tests/machine.sh target/debian/tidegate_0.1.0_amd64.deb
#
#   TIDEGATE_MACHINE_IMAGE   an image as tests/machine/Dockerfile makes it, for where builds have no network
set -eEuo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/until.sh
. tests/until.sh

say() { echo "machine: $*"; }
skip() { say "skipped: $*"; exit 0; }
trap 'say "failed: ended by an error in line $LINENO"' ERR
command -v docker > /dev/null || skip "docker is not installed"
docker info > /dev/null 2>&1 || skip "no Docker engine answers (${DOCKER_HOST:-the default socket})"

package=$(realpath "${1:?the Debian package}")
image=${TIDEGATE_MACHINE_IMAGE:-tidegate-machine:test}
[ -n "${TIDEGATE_MACHINE_IMAGE:-}" ] || docker build --quiet --tag "$image" tests/machine > /dev/null
name=tidegate-machine-$$
trap 'docker rm --force --volumes $name > /dev/null 2>&1 || true' EXIT
docker run --detach --name $name --privileged --cgroupns host --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --tmpfs /run --tmpfs /run/lock \
    --env container=docker "$image" sh -c 'mount --make-rshared / && exec /sbin/init' > /dev/null

on() { docker exec --interactive $name "$@"; }
fail() { say "failed: $*"; on journalctl --unit tidegate --no-pager --lines 20 || true; exit 1; }
is() { [ "$(on systemctl show tidegate --property "$1" --value)" = "$2" ]; }
# Active again, as another process than this one.
is_back() { is ActiveState active && ! is MainPID "$1"; }
pid() { on systemctl show tidegate --property MainPID --value; }
status() { on systemctl show tidegate --property StatusText --value; }
logged() { [[ $(on journalctl --unit tidegate --no-pager) == *"$1"* ]]; }
url=postgres://user:password@localhost:5432/app
tidegate() { docker exec --interactive --env VALKEY_URL=valkey://localhost:6379 --env "DATABASE_URL=$url" $name tidegate "$@"; }
credential() { on sh -c "umask 077 && cat > /etc/tidegate/credentials/$1" <<< "$2"; }
# How long anything may take, in seconds.
LIMIT=60
added=0
# So many increments of nine counters.
add() { added=$((added + $1)); seq "$1" | sed 's/.*\(.\)$/counter-\1/' | tidegate produce --quiet; }
durable() { tidegate wait > /dev/null || fail "$1: not everything is durable"; }

until_holds "the machine is up" eval '[ "$(on systemctl is-system-running 2> /dev/null)" = running ]'
on su postgres -c 'psql --quiet' <<< "create role \"user\" superuser login password 'password'; create database app;"

docker cp --quiet "$package" $name:/tidegate.deb
on dpkg --install /tidegate.deb > /dev/null
is ActiveState inactive && is UnitFileState disabled || fail "the package has started or enabled what has no urls yet"
credential valkey-url valkey://localhost:6379
credential postgres-url "$url"
tidegate migrate > /dev/null
on systemctl enable --quiet --now tidegate
# It is active when it has told so itself.
is ActiveState active || fail "it is not active"
add 1000
durable "after the start"
user=$(on ps --no-headers --format uid --pid "$(pid)" | tr -d ' ')
[ "$user" -gt 60000 ] || fail "it runs as the user $user"
say "installed and active, as user $user: $(status)"

killed=$(pid)
on kill -KILL "$killed"
add 1000
until_holds "it is started again after SIGKILL" is_back "$killed"
durable "after SIGKILL"
say "killed, and started again"

before=$(pid)
on sh -c 'cp /etc/tidegate/tidegate.toml /tidegate.toml && echo "[batch]
max_entrys = 5" >> /etc/tidegate/tidegate.toml'
! on systemctl reload tidegate 2> /dev/null || fail "a configuration that is not valid was taken"
on sh -c 'sed "s/^\[log\]/&\nlevel = \"debug\"/" /tidegate.toml > /etc/tidegate/tidegate.toml'
on systemctl reload tidegate || fail "a valid configuration was refused"
is ActiveState active && is MainPID "$before" || fail "a reload has ended the process"
until_holds "the reload is followed" logged '"event":"reloaded"'
say "reloaded: a configuration that is not valid is refused, a valid one followed"

on systemctl stop postgresql@15-main
add 1000
until_holds "the outage is told" eval '[[ $(on tidegate health) == *"\"degraded\":true"* ]]'
until_holds "the outage is in the status" eval '[[ $(status) == degraded* ]]'
is ActiveState active || fail "an outage of PostgreSQL has ended it"
say "PostgreSQL is away: $(status)"
on systemctl start postgresql@15-main
durable "after the outage"

# Sixty seconds are long for a test.
on sh -c 'mkdir -p /run/systemd/system/tidegate.service.d && printf "[Service]\nWatchdogSec=3\n" > /run/systemd/system/tidegate.service.d/test.conf'
on systemctl daemon-reload
on systemctl restart tidegate
hung=$(pid)
on kill -STOP "$hung"
add 1000
until_holds "the watchdog ends what hangs" is_back "$hung"
durable "after the watchdog"
logged "Watchdog timeout" || fail "it was not the watchdog"
say "hung, and started again by the watchdog"

installed=$(pid)
on dpkg --install /tidegate.deb > /dev/null
until_holds "an upgrade starts the new program" is_back "$installed"
add 1000
on systemctl stop tidegate
is Result success && is ExecMainStatus 0 || fail "it did not end well: $(on systemctl show tidegate --property Result,ExecMainStatus --value | tr '\n' ' ')"
say "upgraded, and stopped"

credential postgres-url postgres://user:wrong@localhost:5432/app
! on systemctl start tidegate 2> /dev/null || fail "it is active with a wrong password"
until_holds "a refused user is not tried again" eval 'is ActiveState failed && is ExecMainStatus 77'
credential postgres-url "$url"
on systemctl start tidegate
durable "in the end"
say "a refused user is not tried again"

counted=$(on su postgres -c 'psql --no-align --tuples-only app' <<< 'select sum(value) from counters')
[ "$counted" = $added ] || fail "$counted and not $added were counted"
tidegate audit --full > /dev/null || fail "the audit finds differences"
on dpkg --purge tidegate > /dev/null
is MainPID 0 && ! on test -e /etc/tidegate || fail "a purge leaves something"
say "$counted of $added increments are counted; purged"
say "passed"
