#!/usr/bin/env bash
# in_venv.sh COMMAND...: run it with .venv's tools if there is a .venv, else with those of this shell.
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" exec "$@"
