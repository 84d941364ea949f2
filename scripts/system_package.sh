#!/usr/bin/env bash
# system_package.sh COMMAND MANAGER=PACKAGE...: make sure that COMMAND is there.
#
#   system_package.sh dot apt-get=graphviz dnf=graphviz brew=graphviz
#
# Installs with the first package manager found when that needs no password (root, passwordless sudo,
# brew); otherwise prints the command to run. Never fails: whoever needs COMMAND says so when it is missing.
set -uo pipefail

wanted=${1:?usage: system_package.sh COMMAND MANAGER=PACKAGE...}
shift
command -v "$wanted" >/dev/null && exit 0

as_root=
[[ $(id -u) == 0 ]] || as_root="sudo -n"
may_be_root() { [[ -z $as_root ]] || $as_root true 2>/dev/null; }

apt_get() {
    local quick="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30"
    # shellcheck disable=SC2086  # words on purpose
    $as_root apt-get $quick update </dev/null &&
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get $quick install -y --no-install-recommends "$1" </dev/null
}

for pair in "$@"; do
    manager=${pair%%=*} package=${pair#*=}
    command -v "$manager" >/dev/null || continue
    echo "'$wanted' is missing; trying: $manager install $package" >&2
    case $manager in
        apt-get) may_be_root && apt_get "$package" ;;
        dnf) may_be_root && $as_root dnf install -y "$package" </dev/null ;;
        brew) brew install "$package" </dev/null ;;
    esac && exit 0
    by_hand="$manager install $package"
    [[ $manager == brew ]] || by_hand="sudo $by_hand"
    echo "'$wanted' could not be installed from here. By hand: $by_hand" >&2
    exit 0
done
echo "'$wanted' is missing and no known package manager (apt-get, dnf, brew) was found." >&2
exit 0
