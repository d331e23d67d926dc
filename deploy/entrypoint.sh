#!/bin/sh
# Starts surtitle as a container or a unit does: `entrypoint.sh` serves, `entrypoint.sh ARGUMENTS` is `surtitle ARGUMENTS`.
# SURTITLE_BIN: the command (default: the one on PATH). SURTITLE_REDIS_URL_FILE: a file with the address of Redis, where
# that holds a password: a secret of Docker, a credential of systemd.
set -eu

fail() {
    echo "surtitle: $*" >&2
    exit 1
}

[ "$(id -u)" != 0 ] || fail "this does not run as root: name a user (docker run --user, User= of a unit)"

command="${SURTITLE_BIN:-surtitle}"
if [ -n "${SURTITLE_REDIS_URL_FILE:-}" ]; then
    [ -z "${SURTITLE_REDIS__URL:-}" ] || fail "SURTITLE_REDIS_URL_FILE and SURTITLE_REDIS__URL are both set: keep one"
    [ -r "$SURTITLE_REDIS_URL_FILE" ] || fail "SURTITLE_REDIS_URL_FILE: $SURTITLE_REDIS_URL_FILE cannot be read"
    SURTITLE_REDIS__URL="$(cat "$SURTITLE_REDIS_URL_FILE")"
    [ -n "$SURTITLE_REDIS__URL" ] || fail "SURTITLE_REDIS_URL_FILE: $SURTITLE_REDIS_URL_FILE is empty"
    export SURTITLE_REDIS__URL
fi
# surtitle refuses variables SURTITLE_... that it does not know.
unset SURTITLE_BIN SURTITLE_REDIS_URL_FILE

[ "$#" != 0 ] || set -- serve
# The service takes this process's place, so that signals are its own.
exec "$command" "$@"
