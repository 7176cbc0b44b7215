#!/bin/sh
# Makes the virtual environment and installs atsnn into it; does nothing where that is already done.
#
#   install.sh VENV [PYTHON]
#
# PYTHON (optional) chooses the interpreter; without it an environment that exists keeps its own. The
# stamp VENV/.atsnn-installed is written last, so an installation that was interrupted is taken up again.
set -eu

# All of it inside braces, so that the shell has read the whole file before it starts: an update of the
# checkout during an installation cannot change what is being run.
{
venv=$1
asked=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
cd "$root"

say() { echo "atsnn: $*" >&2; }

case "$venv" in
    /*) ;;
    *) venv=$root/$venv ;;
esac
stamp=$venv/.atsnn-installed
python=$venv/bin/python

minor_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# What the stamp holds: change any of it and the installation is brought up to date.
fingerprint() {
    echo "$venv"
    "$python" -c 'import sys; print(sys.version)'
    cat pyproject.toml constraints.txt requirements/*.txt "$here/install.sh" | cksum
}

up_to_date() {
    [ -f "$stamp" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ]
}

# Two makes at a time would install over each other: the second waits, then finds the work done.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock"
    flock 9
fi

if [ -e "$venv" ]; then
    has=$(minor_of "$python")
    if [ -z "$has" ]; then
        say "$venv has no working Python; it is made anew"
        rm -rf "$venv"
    elif [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$venv" ]; then
        say "$venv was made in another place; it is made anew"
        rm -rf "$venv"
    elif [ -n "$asked" ]; then
        interpreter=$("$here/find_python.sh" "$asked")
        wanted=$(minor_of "$interpreter")
        if [ "$has" != "$wanted" ]; then
            say "$venv has Python $has and $wanted was asked for; it is made anew"
            rm -rf "$venv"
        fi
    fi
fi

if [ -e "$venv" ] && up_to_date; then
    exit 0
fi

fresh=""
if [ ! -e "$venv" ]; then
    interpreter=$("$here/find_python.sh" "$asked")
    say "making $venv with $interpreter (Python $(minor_of "$interpreter"))"
    "$interpreter" -m venv "$venv"
    fresh=yes
fi
rm -f "$stamp"

pip() {
    "$python" -m pip --disable-pip-version-check --no-input "$@"
}

# An environment whose making was interrupted may lack pip.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null

version=$(minor_of "$python")
if [ -n "$fresh" ]; then
    say "installing for Python $version; this downloads about 3 GB (torch and its CUDA libraries)"
else
    say "bringing $venv up to date (Python $version)"
fi
pip install --quiet 'pip>=22.3'
case "$version" in
    3.10)
        pip install --quiet -e '.[dev,lava]' -c constraints.txt
        ;;
    3.11 | 3.12)
        pip install --quiet -e '.[dev]' -r requirements/lava-py311.txt -c constraints.txt
        # Lava declares 3.10 only; what stops it on these versions is put right by export/lava/compat.py.
        pip install --quiet --no-deps --ignore-requires-python -c constraints.txt lava-nc lava-dl
        ;;
    3.13)
        pip install --quiet -e '.[dev]' -c constraints.txt
        say "Lava was skipped: it does not run on Python $version. With it: make PYTHON=python3.10 test (or 3.11, 3.12)"
        ;;
    *)
        say "Python $version is not supported; atsnn needs one of 3.10, 3.11, 3.12, 3.13"
        exit 1
        ;;
esac

fingerprint >"$stamp.part"
mv "$stamp.part" "$stamp"
say "installed in $venv"
exit 0
}
