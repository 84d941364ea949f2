#!/usr/bin/env bash
# make_venv.sh VENV: create the virtual environment and install adkit with its dev tools into it.
#
# Settings, all optional, all from the environment:
#   PYTHON             the interpreter to build on (default: the first one that is 3.11 or newer)
#   TORCH              a torch requirement or wheel to install first, e.g. 'torch==2.11.*'
#   CONSTRAINTS        the pins to install with (default: constraints.txt, or none where CUDA is present)
#   ADKIT_SYSTEM_SITE  1: see the system's packages, for a machine that has torch but no network
set -euo pipefail

venv=${1:?usage: make_venv.sh VENV}

new_enough() { # a version manager's shim can exist and still not run, so ask the interpreter itself
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "adkit needs Python 3.11 or newer; tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}." >&2
    echo "Install one, or name it: make venv PYTHON=/path/to/python3.12" >&2
    return 1
}

ensure_venv_module() { # Debian ships `venv` without ensurepip until a package is added
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    local package
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    bash "$(dirname "$0")/system_package.sh" "$package" apt-get="$package" || true
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    echo "$1 cannot create virtual environments: install $package, then run make again." >&2
    return 1
}

has_cuda() {
    nvidia-smi >/dev/null 2>&1 ||
        "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1
}

python=$(find_python)
echo "Python: $python ($("$python" -V))"
ensure_venv_module "$python"

link_checkout() { # what an editable install comes down to, for a machine that cannot run one
    local site
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pwd >"$site/adkit-checkout.pth"
    printf '#!%s\nimport sys\nfrom adkit.cli import main\nsys.exit(main())\n' "$(cd "$venv/bin" && pwd)/python" \
        >"$venv/bin/adkit"
    chmod +x "$venv/bin/adkit"
}

if [[ ${ADKIT_SYSTEM_SITE:-0} == 1 ]]; then
    "$python" -m venv --system-site-packages "$venv"
    # The system's packages are taken as they are: no pins, no isolated build that would need a network.
    "$venv/bin/python" -m pip install --retries 1 --no-build-isolation -e '.[dev]' || {
        echo "Not everything could be installed; adkit is linked to the packages that are here." >&2
        link_checkout
    }
    exit
fi

if [[ -z ${CONSTRAINTS+set} ]]; then
    CONSTRAINTS=constraints.txt
    if [[ -n ${TORCH:-} ]] || has_cuda "$python"; then
        CONSTRAINTS=
        echo "CUDA or TORCH given: no pins, the ranges in pyproject.toml hold."
    fi
fi

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
if [[ -n ${TORCH:-} ]]; then
    "$venv/bin/python" -m pip install "$TORCH"
fi
"$venv/bin/python" -m pip install ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e '.[dev]'
