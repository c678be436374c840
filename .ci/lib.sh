# Sourced by the scripts beside it: the cache folder, messages, packages and interpreters.
# Everything fetched or built lies under $CACHE, outside the repository; FASTLISTEN_CI_CACHE moves it.
# shellcheck shell=bash
CI=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck disable=SC2034   # used by the scripts that source this file
REPO=${CI%/*}
export HOME=${HOME:-~}  # a service may be started without it; the tilde then asks the user database
CACHE=$(readlink -m "${FASTLISTEN_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fastlisten-ci}")
mkdir -p "$CACHE"
# A download that fails for the network's sake is tried again.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_RETRIES=8 PIP_TIMEOUT=30

# What was compiled once is not compiled again, in whichever copy of the tree.
export CCACHE_DIR=$CACHE/ccache CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=1G
if [ -d /usr/lib/ccache ]; then PATH=/usr/lib/ccache:$PATH; fi

export MYPY_CACHE_DIR=$CACHE/mypy

# Root may check a tree that belongs to somebody else.
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=$REPO

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
    quietly apt-get -q -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 update
    DEBIAN_FRONTEND=noninteractive quietly without_services \
        apt-get -yq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}

# without_services COMMAND...: an installation that starts no service of what it brings: invoke-rc.d(8) asks
# policy-rc.d, which says here that it is forbidden.  Many would serve every interface.
without_services() (
    policy=/usr/sbin/policy-rc.d
    exec 5< "${policy%/*}"
    flock 5  # another of these may be about to take the file away
    if ! [ -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
    fi
    "$@" 5<&-
)

# host_python X.Y: prints an interpreter of this machine of that version, with its headers.
# A pyenv shim may stand in PATH and yet run nothing, so each candidate is tried.
host_python() {
    local p
    for p in "python$1" "/usr/bin/python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
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

# host_versions: the X.Y of every CPython from 3.11 up that host_python finds, a line each
host_versions() {
    local minor
    for ((minor = 11; minor < 40; minor++)); do
        if host_python "3.$minor" > /dev/null; then echo "3.$minor"; fi
    done
}

# source_copy DIR: the tracked and new files of the working tree, without build products
source_copy() {
    rm -rf "$1"
    mkdir -p "$1"
    (cd "$REPO" && git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' f; do if [ -e "$f" ]; then printf '%s\0' "$f"; fi; done |
        tar --null -T - -cf -) | tar -xf - -C "$1"
}

# build_venv DIR PYTHON [PACKAGE...]: a venv with what pyproject.toml wants for building, and these; made once.
build_venv() {
    local dir=$1 python=$2 wanted
    shift 2
    wanted=$(printf '%s\n' "$@"; "$python" -c '
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["build-system"]["requires"], sep="\n")' "$REPO/pyproject.toml")
    if [ "$(cat "$dir/.wanted" 2> /dev/null)" = "$wanted" ]; then return; fi
    rm -rf "$dir"
    "$python" -m venv "$dir"
    echo "$wanted" > "$dir/.getting"
    quietly "$dir/bin/python" -m pip install -r "$dir/.getting"
    mv "$dir/.getting" "$dir/.wanted"
}

# nox_version: the X.Y of the CPython that nox runs on, the newest of those that every package has wheels for
nox_version() {
    local version
    for version in 3.13 3.12 3.11; do
        if host_python "$version" > /dev/null; then echo "$version"; return; fi
    done
    die 'CPython 3.11, 3.12 or 3.13 with its headers is needed'
}

# sessions TREE ENVIRONMENTS ARGUMENT...: nox, with these arguments, in a copy of the tree that source_copy made
sessions() {
    local tree=$1 environments=$2 python
    shift 2
    python=$(host_python "$(nox_version)")
    (
        exec 6> "$CACHE/nox.lock"
        flock 6
        build_venv "$CACHE/nox" "$python" nox
        if ! [ -e "$tree/.git" ]; then
            git -C "$tree" init -q
            git -C "$tree" add --all --force
        fi
    )
    "$CACHE/nox/bin/nox" --noxfile "$tree/noxfile.py" --envdir "$environments" --error-on-missing-interpreters "$@"
}

# apt_view DIR SUITE [ARCHITECTURE]: APT becomes the options for a private view, kept in DIR, of another Debian suite
# on the mirror that this machine's apt is set to.  /etc/apt is read, never changed.
apt_view() {
    local dir=$1 arch=${3:-$(dpkg --print-architecture)} code uri key=/usr/share/keyrings/debian-archive-keyring.gpg
    code=$(. /etc/os-release && echo "${VERSION_CODENAME:?}")
    uri=$(apt-get --print-uris update 2> /dev/null |
        sed -n "s#^'\\(.*\\)/dists/$code/InRelease'.*#\\1#p" | head -n 1)
    [ -n "$uri" ] || die "no Debian mirror for $code in this machine's apt configuration"
    [ -r "$key" ] || die "$key is missing: install debian-archive-keyring"
    mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/cache"
    printf '%s [signed-by=%s] %s %s main\n' deb "$key" "$uri" "$2" deb-src "$key" "$uri" "$2" > "$dir/sources.list"
    : > "$dir/status"   # an empty package database: whatever is needed gets listed
    APT=(-q -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch"
         -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=-
         -o Dir::Etc::preferences=- -o Dir::Etc::preferencesparts=-
         -o "Dir::State::Lists=$dir/lists" -o "Dir::State::status=$dir/status"
         -o "Dir::State::extended_states=$dir/extended_states" -o "Dir::Cache=$dir/cache"
         -o "Dir::Cache::archives=$dir/archives" -o APT::Sandbox::User=
         -o APT::Install-Recommends=0 -o Acquire::Languages=none -o Debug::NoLocking=1
         -o APT::Update::Post-Invoke-Success::= -o APT::Update::Post-Invoke::=)
    quietly apt-get "${APT[@]}" update
}

# apt_unpack DIR ROOT PACKAGE...: downloads these packages and what they need through APT and unpacks them in ROOT,
# without the ones that no interpreter needs or this machine's compiler brings.  1: there is no such package.
apt_unpack() {
    local dir=$1 root=$2 list deb
    shift 2
    list=$(apt-get "${APT[@]}" install --print-uris "$@" 2> /dev/null |
        sed -n "s/^'[^']*' \\([^_]*\\)_\\(.*\\)_[^_]*\\.deb .*/\\1=\\2/p" | sed 's/%3a/:/') || true
    [ -n "$list" ] || return 1
    list=$(grep -vE "^(libc6-dev|libc-dev-bin|linux-libc-dev|zlib1g-dev|libexpat1-dev|libcrypt-dev|rpcsvc-proto|debconf|\
openssl|ca-certificates|perl-base|dpkg|tar|fonts-.*|x11-common)=" <<< "$list")
    rm -rf "$dir/debs"
    mkdir -p "$dir/debs" "$root"
    # shellcheck disable=SC2086   # one word a package
    (cd "$dir/debs" && quietly apt-get "${APT[@]}" download $list) || die 'a download failed'
    for deb in "$dir"/debs/*.deb; do dpkg -x "$deb" "$root"; done
    rm -rf "$dir/debs"
}
