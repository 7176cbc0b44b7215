#!/bin/sh
# Prints the path of a Python interpreter that can make a virtual environment for atsnn.
#
#   find_python.sh            the first of 3.10, 3.11, 3.12, 3.13 on PATH, from pyenv or from uv
#   find_python.sh python3.11 exactly that one (a name, a path or a version such as 3.11)
#
# Prints one line on stderr and exits 1 where there is none.
set -eu

VERSIONS="3.10 3.11 3.12 3.13"

fail() {
    echo "atsnn: $*" >&2
    exit 1
}

# "3.11" if $1 runs, else nothing. (A pyenv shim is on PATH even where its version is not chosen: run it.)
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# Every place where Python $1 may lie, one a line, best first.
places() {
    command -v "python$1" 2>/dev/null || true
    for generic in python3 python; do
        command -v "$generic" 2>/dev/null || true
    done
    for root in "${PYENV_ROOT:-}" "${HOME:-/root}/.pyenv"; do
        [ -n "$root" ] || continue
        for found in "$root"/versions/"$1"*/bin/python; do
            [ -x "$found" ] && echo "$found"
        done
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-project --no-python-downloads "$1" 2>/dev/null || true
    fi
    return 0
}

# The first working Python $1 that can make a virtual environment; sets FOUND, or NO_VENV.
FOUND=""
NO_VENV=""
look_for() {
    old_ifs=$IFS
    IFS='
'
    for candidate in $(places "$1"); do
        [ "$(version_of "$candidate")" = "$1" ] || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
            FOUND=$("$candidate" -c 'import sys; print(sys.executable)')
            break
        fi
        NO_VENV="${NO_VENV:-$1}"
    done
    IFS=$old_ifs
}

asked="${1:-}"
if [ -n "$asked" ]; then
    case "$asked" in
        [0-9]*) wanted=$asked ;;
        *) wanted=$(version_of "$asked")
           [ -n "$wanted" ] || wanted=$(expr "$asked" : 'python\([0-9][0-9.]*\)$' || true) ;;
    esac
    [ -n "$wanted" ] || fail "PYTHON=$asked is not a Python interpreter that runs here"
    case " $VERSIONS " in
        *" $wanted "*) ;;
        *) fail "PYTHON=$asked is Python $wanted; atsnn needs one of: $VERSIONS" ;;
    esac
    # A name or path that runs is taken as it is; otherwise its version is looked for.
    if [ "$(version_of "$asked")" = "$wanted" ]; then
        if "$asked" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
            FOUND=$("$asked" -c 'import sys; print(sys.executable)')
        else
            NO_VENV=$wanted
        fi
    fi
    [ -n "$FOUND" ] || look_for "$wanted"
    VERSIONS=$wanted
else
    for version in $VERSIONS; do
        look_for "$version"
        [ -z "$FOUND" ] || break
    done
fi

if [ -z "$FOUND" ] && [ -n "$NO_VENV" ]; then
    fail "Python $NO_VENV is here but cannot make a virtual environment; on Debian: apt install python$NO_VENV-venv"
fi
[ -n "$FOUND" ] || fail "no suitable Python found on PATH, in ~/.pyenv or with uv (looked for: $VERSIONS); on Debian: apt install python3 python3-venv, or choose one with make PYTHON=/path/to/python"
echo "$FOUND"
