#!/usr/bin/env bash
# Brings PostgreSQL's own regression database, for the long test that moves it.
#
#   scripts/regression-database.sh [--quiet]
#
# Afterwards, in the checkout:
#   .provision/regression/regression.dump    what the regression tests of PostgreSQL 15 leave behind, by pg_dump -Fc
#   .provision/regression/lib/               the C functions that it uses; any server 15 of this machine can load them
#
# On Debian, with postgresql-15, gcc, make and dpkg-dev. The source comes from the archives that the machine's own apt
# trusts, in the version that is installed where they have it; apt checks it. It is built and run in a temporary
# folder, and against a throw-away server. Takes some minutes once; a second run takes a moment. No root is needed; run
# by root, the server runs as the user postgres, since PostgreSQL refuses to run as root.
#
# PGTANDEM_CACHE   where it is kept; default ~/.cache/pgtandem

set -euo pipefail
shopt -s inherit_errexit
umask 022

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly PACKAGE=postgresql-15
readonly BIN=/usr/lib/postgresql/15/bin
# Counts up when this script makes something else of the same source.
readonly EDITION=1

quiet=
scratch=
server=

say() { [[ -n $quiet ]] || printf 'regression database: %s\n' "$*"; }
fail() { printf 'regression database: error: %s\n' "$1" >&2; [[ -z ${2-} ]] || printf 'regression database: hint: %s\n' "$2" >&2; exit 1; }

clean_up() {
    [[ -z $server ]] || as_server_user "$BIN/pg_ctl" stop --pgdata "$server" --mode immediate --silent || true
    [[ -z $scratch ]] || rm -rf "$scratch"
}

main() {
    parse_arguments "$@"
    require_programs
    locate_store
    exec 9>"$STORE/regression.lock"
    flock 9
    local version folder
    version=$(installed_version)
    folder=$STORE/regression/$version-$EDITION
    if [[ ! -f $folder/regression.dump ]]; then
        scratch=$(mktemp -d /tmp/pgtandem-regression-XXXXXX)
        chmod 755 "$scratch"
        trap clean_up EXIT
        fetch "$version"
        build
        place_library "$folder/lib"
        ((EUID != 0)) || chown -R postgres: "$scratch"
        start_server
        run_tests "$folder/lib"
        keep "$folder"
    fi
    mkdir -p "$ROOT/.provision"
    ln -sfn "$folder" "$ROOT/.provision/regression"
    say "ready: $folder"
}

parse_arguments() {
    while (($#)); do
        case $1 in
            --quiet) quiet=1; shift ;;
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            *) fail "unknown argument $1" "see scripts/regression-database.sh --help" ;;
        esac
    done
}

require_programs() {
    local program
    for program in apt-get dpkg-query gcc make tar; do
        command -v "$program" >/dev/null || fail "$program is missing" "this script works on Debian and its kin"
    done
    [[ -x $BIN/postgres ]] || fail "$BIN/postgres is missing" "apt-get install $PACKAGE"
}

# As scripts/provision.sh: in the cache, or where an unprivileged user can reach it.
locate_store() {
    local base=${PGTANDEM_CACHE:-}
    if [[ -z $base ]]; then
        [[ -n ${XDG_CACHE_HOME:-}${HOME:-} ]] || fail "neither HOME nor PGTANDEM_CACHE is set" "export PGTANDEM_CACHE=/a/folder"
        base=${XDG_CACHE_HOME:-$HOME/.cache}/pgtandem
    fi
    mkdir -p "$base" || fail "cannot create $base" "set PGTANDEM_CACHE to a folder that can be written"
    STORE=$(cd "$base" && pwd -P)/store
    if ((EUID == 0)) && ! reachable_by_all "${STORE%/store}"; then
        STORE=/var/cache/pgtandem
    fi
    mkdir -p "$STORE/regression"
    [[ ! -L $STORE && -O $STORE ]] || fail "$STORE belongs to somebody else" "remove it, or set PGTANDEM_CACHE to a folder of your own"
    chmod 755 "$STORE" "$STORE/regression"
    readonly STORE
}

reachable_by_all() {
    local folder=$1
    while [[ $folder != / ]]; do
        [[ $(stat -c %A "$folder") == *[xt] ]] || return 1
        folder=$(dirname "$folder")
    done
}

as_server_user() {
    if ((EUID == 0)); then
        (cd / && setpriv --reuid postgres --regid postgres --clear-groups env HOME="$scratch" "$@")
    else
        (cd / && "$@")
    fi
}

installed_version() {
    dpkg-query --show --showformat '${Version}' "$PACKAGE" 2>/dev/null || fail "the package $PACKAGE is not installed" "apt-get install $PACKAGE"
}

# The machine's own sources of packages, asked for source packages, in a folder of their own: nothing of the machine's
# state is touched. Only those of the release itself; others hold no PostgreSQL, or another one.
source_lists() {
    local release=$1 folder=$2 file
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -f $file ]] || continue
        awk -v RS= -v ORS='\n\n' -v release="$release" '$0 ~ ("(^|\n)Suites:([^\n]*[ \t])?" release "(-|[ \t\n]|$)")' "$file" |
            sed 's/^Types:.*/Types: deb-src/' >"$folder/${file##*/}"
    done
    awk -v release="$release" '$1 == "deb" && $0 ~ ("[ \t]" release "(-|[ \t])") { sub(/^deb/, "deb-src"); print }' \
        /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null >"$folder/lines.list" || true
    find "$folder" -size 0 -delete
    [[ -n $(find "$folder" -type f) ]] || fail "apt has no source of packages for $release"
}

fetch() {
    local wanted=$1 release apt=$scratch/apt version
    say "fetching the source of $PACKAGE"
    release=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/cache/archives/partial"
    source_lists "$release" "$apt/sources"
    local options=(
        -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$apt/sources"
        -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=
    )
    apt-get "${options[@]}" update >"$apt/log" 2>&1 || { tail -n 5 "$apt/log" >&2; fail "apt cannot read its archives"; }
    # An archive may name a version that it no longer, or not yet, has.
    for version in "$wanted" $(apt-cache "${options[@]}" showsrc "$PACKAGE" | awk '$1 == "Version:" { print $2 }' | sort -ruV); do
        (cd "$scratch" && apt-get "${options[@]}" source --download-only "$PACKAGE=$version") >>"$apt/log" 2>&1 && break
    done
    mkdir "$scratch/source"
    tar --extract --file "$(find "$scratch" -maxdepth 1 -name '*.orig.tar.*' ! -name '*.asc' | head -n 1)" \
        --directory "$scratch/source" --strip-components=1 2>/dev/null ||
        { tail -n 5 "$apt/log" >&2; fail "the source of $PACKAGE cannot be fetched"; }
}

# The C functions and the program that plays the tests; the server is the installed one.
build() {
    say "building what the tests need"
    (
        cd "$scratch/source"
        ./configure --without-readline --without-zlib --prefix=/nonexistent
        make -C src/test/regress
    ) >"$scratch/build.log" 2>&1 || { tail -n 5 "$scratch/build.log" >&2; fail "the source of $PACKAGE could not be built"; }
}

# The tests write the library's place into the definitions of functions, so it must be the final one.
place_library() {
    local folder=$1
    mkdir -p "$folder"
    install -m 755 "$scratch"/source/src/test/regress/{regress,refint,autoinc}.so "$folder/"
    chmod -R u+rwX,go+rX,go-w "${folder%/lib}"
}

start_server() {
    server=$scratch/data
    as_server_user "$BIN/initdb" --pgdata "$server" --username postgres --no-locale --encoding UTF8 --no-sync \
        >"$scratch/initdb.log" 2>&1 || { tail -n 5 "$scratch/initdb.log" >&2; fail "initdb failed"; }
    as_server_user "$BIN/pg_ctl" start --pgdata "$server" --wait --silent --log "$scratch/server.log" \
        --options "-c listen_addresses= -c unix_socket_directories=$scratch -c fsync=off -c max_prepared_transactions=2" ||
        { tail -n 5 "$scratch/server.log" >&2; fail "the server does not start"; }
}

# Plans and messages may differ from what is expected; it is what the tests leave behind that counts. Roles they do not.
run_tests() {
    local library=$1 tests=$scratch/source/src/test/regress
    say "running the regression tests"
    as_server_user "$tests/pg_regress" --host="$scratch" --user=postgres --inputdir="$tests" --outputdir="$scratch" \
        --bindir="$BIN" --dlpath="$library" --max-concurrent-tests=20 --schedule="$tests/parallel_schedule" \
        >"$scratch/regress.log" 2>&1 || true
    grep -q '^test ' "$scratch/regress.log" || { tail -n 5 "$scratch/regress.log" >&2; fail "the regression tests did not run"; }
    say "$(grep -c FAILED "$scratch/regress.log" || true) tests did not print what was expected"
}

keep() {
    local folder=$1
    as_server_user "$BIN/pg_dump" --host "$scratch" --username postgres --format custom regression >"$folder/partial.dump"
    mv "$folder/partial.dump" "$folder/regression.dump"
}

main "$@"
