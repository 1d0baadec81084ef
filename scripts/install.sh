#!/usr/bin/env bash
# Makes the virtual environment and installs the pinned CPU stack and this package, editable.
# `make install` runs it when the pins or pyproject.toml are newer than the last installation.
#
#   PYTHON           interpreter of a new environment    default: python3.11, else python3.12
#   VENV             folder of the environment           default: .venv
#   TORCH_INDEX_URL  index that torch comes from, e.g. PyTorch's index of CPU wheels
#   PIP_FLAGS        default: -qq; empty shows pip's own output
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PIP_FLAGS=${PIP_FLAGS--qq}

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A name that is on PATH may still be a shim that fails, so each candidate is run.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON does not run as Python 3.11 or 3.12"
    fi
    die "neither python3.11 nor python3.12 was found; install one, or name it: make install PYTHON=/path/to/python3.11"
}

make_environment() {
    if is_supported "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "using $VENV ($("$VENV/bin/python" --version))"
        return
    fi
    local python
    python=$(find_python)
    [ ! -e "$VENV" ] || say "replacing $VENV: no working Python 3.11 or 3.12 with pip in it"
    say "making $VENV ($("$python" --version))"
    "$python" -m venv --clear "$VENV" ||
        die "$python cannot make virtual environments (Debian, Ubuntu: apt install $("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])'))"
}

pip_install() {
    # shellcheck disable=SC2086  # PIP_FLAGS is a list of words
    "$VENV/bin/python" -m pip --require-virtualenv --disable-pip-version-check install $PIP_FLAGS "$@"
}

[ "$(uname -s)" = Linux ] || die "vLLM's wheels are for Linux only; this is $(uname -s)"
make_environment

# The list is complete, so --no-deps: pip must not add the packages that it leaves out on purpose.
say "1/3 the pinned packages ($(grep -c '==' requirements/cpu.txt) of them, a minute or two)"
pip_install --no-deps -r requirements/cpu.txt

# After the list, so that torch's own requirements are there at the pinned versions, and with its
# dependencies, because a CUDA build needs its libraries. The conflicts that pip would warn of are the
# packages that the list leaves out.
say "2/3 $(grep '==' requirements/torch.txt)${TORCH_INDEX_URL:+ from $TORCH_INDEX_URL}"
pip_install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --no-warn-conflicts -r requirements/torch.txt

say "3/3 rlhf-dist itself"
pip_install --no-deps --no-build-isolation --editable .

touch "$VENV/.installed"
