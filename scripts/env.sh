# Sourced by the other scripts: where things are, which Rust is used and how many jobs fit.
# Sets: root, target, jobs, and exports CARGO_TARGET_DIR, CARGO_BUILD_JOBS, RUSTUP_TOOLCHAIN where they are needed.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# SELVEDGE_TARGET_DIR moves the build (and everything else that is made) elsewhere.
if [[ -n ${SELVEDGE_TARGET_DIR:-} ]]; then
  export CARGO_TARGET_DIR="$SELVEDGE_TARGET_DIR"
fi
target="${CARGO_TARGET_DIR:-$root/target}"
[[ $target == /* ]] || target="$root/$target"
# shellcheck disable=SC2034 # read by the scripts that source this one
tools="$target/tools"

# rustup puts its programs here and tells only new shells.
if ! command -v cargo >/dev/null && [[ -x ${CARGO_HOME:-${HOME:-/root}/.cargo}/bin/cargo ]]; then
  export PATH="${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH"
fi

rust_wanted="$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml")"

# at_least 1.95 1.95.0: the second is the first or newer.
at_least() {
  [[ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" == "$1" ]]
}

# The version of the Rust that `cargo` would use here; empty when there is none.
rust_version() {
  (cd "$root" && rustc --version 2>/dev/null | awk '{ print $2 }') || true
}

# When the default toolchain is older than the project needs and a newer stable one is installed, use that one.
if [[ -z ${RUSTUP_TOOLCHAIN:-} ]] && ! at_least "$rust_wanted" "$(rust_version)" && command -v rustup >/dev/null; then
  if stable="$(RUSTUP_TOOLCHAIN=stable rustc --version 2>/dev/null | awk '{ print $2 }')" &&
    [[ -n $stable ]] && at_least "$rust_wanted" "$stable"; then
    export RUSTUP_TOOLCHAIN=stable
  fi
fi

# Memory that a build may use, in MiB: the machine's, or the control group's where that is less.
memory_mib() {
  local machine group
  machine="$(awk '/^(MemTotal|SwapTotal):/ { sum += $2 } END { print int(sum / 1024) }' /proc/meminfo)"
  group="$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)"
  if [[ $group =~ ^[0-9]+$ ]] && ((group / 1048576 < machine)); then
    machine=$((group / 1048576))
  fi
  echo "$machine"
}

# One job for each 1.5 GiB: the largest units of RocksDB and the linker need that much.
jobs_that_fit() {
  local cores fit
  cores="$(nproc)"
  fit=$(($(memory_mib) / 1536))
  ((fit >= 1)) || fit=1
  ((fit < cores)) && echo "$fit" || echo "$cores"
}

jobs="${CARGO_BUILD_JOBS:-$(jobs_that_fit)}"
export CARGO_BUILD_JOBS="$jobs"
