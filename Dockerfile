# syntax=docker/dockerfile:1

# The image of one pgtandem daemon: the binary, the CA certificates, and PostgreSQL's client programs.
#
#   docker build -t pgtandem --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker run --rm --read-only --tmpfs /tmp:size=1g,mode=1777 \
#     -e PGTANDEM_SOURCE_URL -e PGTANDEM_TARGET_URL pgtandem check
#
# For a reproducible build give both base images by digest:
#   --build-arg RUST_IMAGE=rust:1-slim-bookworm@sha256:… --build-arg RUNTIME_IMAGE=debian:bookworm-slim@sha256:…

ARG RUST_IMAGE=rust:1-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

# ---------------------------------------------------------------------------------------------- build
FROM ${RUST_IMAGE} AS build
WORKDIR /build

# The dependencies alone, in a layer of their own: it is built again only when Cargo.toml or Cargo.lock change.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src \
    && printf '//! Stands in for the library while the dependencies are built.\n' > src/lib.rs \
    && printf '//! Stands in for the binary while the dependencies are built.\nfn main() {}\n' > src/main.rs \
    && cargo build --release --locked --lib --bins

COPY src src
# COPY keeps the age of a file, and Cargo builds what is younger than its last build: make the real sources young.
RUN find src -name '*.rs' -exec touch {} + \
    && cargo build --release --locked --lib --bins \
    && install -m 0755 -D target/release/pgtandem /out/pgtandem \
    && /out/pgtandem --version

# ------------------------------------------------------------------------------ PostgreSQL's apt key
# Debian's own postgresql-common carries the key of apt.postgresql.org, signed by Debian: nothing is fetched on trust.
FROM ${RUNTIME_IMAGE} AS pgdg
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends postgresql-common \
    && rm -rf /var/lib/apt/lists/*

# -------------------------------------------------------------------------------------------- runtime
FROM ${RUNTIME_IMAGE} AS runtime

# pg_dump must not be older than the source, and what it writes must be accepted by the target. So several majors are
# here, in /usr/lib/postgresql/<major>/bin, and pgtandem chooses for each move, among those that are not older than the
# source: the target's major, else the nearest older one, else the nearest newer one; 17 and newer only for targets of 17
# and newer. A newer major is added here; older ones may be left out, but 16, which serves every target below 17, must
# stay. `pgtandem check` names the programs that it would use.
ARG PG_MAJORS="18 17 16 15 14"

COPY --from=pgdg /usr/share/postgresql-common/pgdg/apt.postgresql.org.asc /usr/share/keyrings/apt.postgresql.org.asc

# Package versions are not pinned: PostgreSQL's apt repository keeps the latest minor release of each major only, and
# that is the one to have. CA certificates come first, so that the repository is read over TLS.
SHELL ["/bin/bash", "-o", "errexit", "-o", "nounset", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && codename="$(. /etc/os-release && echo "${VERSION_CODENAME}")" \
    && echo "deb [signed-by=/usr/share/keyrings/apt.postgresql.org.asc] https://apt.postgresql.org/pub/repos/apt ${codename}-pgdg main" \
        > /etc/apt/sources.list.d/pgdg.list \
    && apt-get update \
    && read -r -a majors <<< "${PG_MAJORS}" \
    && apt-get install -y --no-install-recommends "${majors[@]/#/postgresql-client-}" \
    && rm -rf /var/lib/apt/lists/* \
    && for major in "${majors[@]}"; do "/usr/lib/postgresql/${major}/bin/pg_dump" --version; done \
    && groupadd --system --gid 65532 pgtandem \
    && useradd --system --uid 65532 --gid 65532 --home-dir /nonexistent --shell /usr/sbin/nologin pgtandem

COPY --from=build /out/pgtandem /usr/local/bin/pgtandem

# The default configuration file is ./pgtandem.toml: mount yours as /etc/pgtandem/pgtandem.toml, or none at all and
# give every key as PGTANDEM_<SECTION>_<KEY>. In a container set http.listen to 0.0.0.0:8432 (the default is loopback).
WORKDIR /etc/pgtandem

# The root file system may be read-only. The temporary folder (TMPDIR, else /tmp) must be writable: the archive of the
# schema lies there, some megabytes. With copy.method = "dump" all rows go to the working folder, compressed: make it a
# volume (--workdir). Nothing in either outlives a move: all durable memory is in the target.
ENV TMPDIR=/tmp

# By number, so that Kubernetes can verify runAsNonRoot.
USER 65532:65532

EXPOSE 8432

# The daemon handles SIGTERM and SIGINT itself and waits for its children, so no init is needed in front of it.
# The first signal stops it cleanly, the second at once.
STOPSIGNAL SIGTERM

# No HEALTHCHECK on purpose. Orchestrators probe GET /healthz from outside, which also proves that the port is reachable;
# Kubernetes ignores HEALTHCHECK; and a check from inside would need an HTTP client that is in the image for that alone.
# HEALTHCHECK NONE also drops whatever a base image may bring.
HEALTHCHECK NONE

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pgtandem" \
      org.opencontainers.image.description="Moves a live PostgreSQL database to another server with near-zero downtime" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

ENTRYPOINT ["pgtandem"]
CMD ["run"]
