#!/usr/bin/env bash
# The program for 64-bit ARM, made by a cross compiler and run by QEMU: its tests without servers, then the main job's, in which only the program is emulated,
# and the servers and the tests are not. What is missing is said.
#
#   tests/arm64.sh FILTER...     the tests, such as crash:: outage::
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
skip() { echo "arm64: skipped: $*"; exit 0; }
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || skip "there is no qemu-aarch64 (Debian: qemu-user-static)"
command -v aarch64-linux-gnu-gcc > /dev/null || skip "there is no cross compiler (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross)"
[ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || skip "Rust lacks the target: rustup target add $target"

# As Debian's cross compiler has them.
libraries=/usr/aarch64-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$emulator -L $libraries"
cargo build --locked --target $target --bin tidegate
cargo test --locked --target $target --lib

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
printf '#!/bin/sh\nexec %s -L %s %s "$@"\n' "$emulator" $libraries "$(realpath "${CARGO_TARGET_DIR:-target}")/$target/debug/tidegate" > "$folder/tidegate"
chmod +x "$folder/tidegate"
# An emulated program is slow.
cargo test --locked --test it --no-run
tests=$(cargo test --locked --test it --no-run --message-format json 2> /dev/null | sed -n 's/.*"executable":"\([^"]*\/it-[^"]*\)".*/\1/p' | tail -n 1)
CARGO_BIN_EXE_tidegate=$folder/tidegate TIDEGATE_TEST_LIMIT=${TIDEGATE_TEST_LIMIT:-120} "$tests" --test-threads 4 "$@"
