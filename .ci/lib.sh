# Sourced by the scripts beside it: the cache folder, messages, packages and interpreters.
# Everything fetched or built lies under $CACHE, outside the repository; FASTLISTEN_CI_CACHE moves it.
# shellcheck shell=bash
CI=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck disable=SC2034   # used by the scripts that source this file
REPO=${CI%/*}
CACHE=$(readlink -m "${FASTLISTEN_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fastlisten-ci}")
mkdir -p "$CACHE"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# quietly COMMAND...: its output is shown only when it fails
quietly() {
    local log rc=0
    log=$(mktemp "$CACHE/log.XXXXXX")
    "$@" > "$log" 2>&1 || { rc=$?; tail -n 40 "$log" >&2; say "failed ($rc): $*"; }
    rm -f "$log"
    return "$rc"
}

# debian_packages NAME...: installs those that are missing
debian_packages() {
    if dpkg -s "$@" > /dev/null 2>&1; then return; fi
    [ "$(id -u)" = 0 ] || die "root is needed to install: $*"
    quietly apt-get -q -o DPkg::Lock::Timeout=300 update
    DEBIAN_FRONTEND=noninteractive quietly \
        apt-get -yq -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}

# host_python X.Y: prints an interpreter of this machine of that version, with its headers.
# A pyenv shim may stand in PATH and yet run nothing, so each candidate is tried.
host_python() {
    local p
    for p in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$p" -c "
import os, sys, sysconfig
ok = '%d.%d' % sys.version_info[:2] == '$1' and sys.implementation.name == 'cpython'
ok = ok and os.path.exists(sysconfig.get_config_h_filename())
sys.exit(not ok)" 2> /dev/null; then
            "$p" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# source_copy DIR: the tracked and new files of the working tree, without build products
source_copy() {
    rm -rf "$1"
    mkdir -p "$1"
    (cd "$REPO" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' f; do if [ -e "$f" ]; then printf '%s\0' "$f"; fi; done |
        tar --null -T - -cf -) | tar -xf - -C "$1"
}
