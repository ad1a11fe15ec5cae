//! Where the programs are. Everything but pgtandem itself is what `scripts/provision.sh` brought.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::options::Options;

/// The versions whose client programs are provided.
const CLIENTS: [u16; 2] = [16, 18];

/// One version of the server.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    pub(crate) major: u16,
    /// The folder with `initdb`, `pg_ctl` and `postgres`, with links resolved: the servers' user may not pass the checkout.
    pub(crate) bin: PathBuf,
}

/// pgcopydb, and what it needs on the source.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) program: PathBuf,
    /// The folder of the decoding plugin.
    pub(crate) plugins: PathBuf,
}

/// All that is run.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) source: Installation,
    pub(crate) target: Installation,
    /// The folder with `pgbench`, and with the `pg_dump` that pgtandem finds.
    pub(crate) client: PathBuf,
    pub(crate) pgtandem: PathBuf,
    /// None where it, or the plugin for the source's version, was not to be had.
    pub(crate) pgcopydb: Option<Peer>,
    /// Debian's pgcopydb, with or without that plugin: a copy needs none.
    pub(crate) debian_pgcopydb: Option<PathBuf>,
    /// Another pgcopydb, which the user has on the search path.
    pub(crate) other_pgcopydb: Option<PathBuf>,
    /// This program, which is the null reader, too.
    pub(crate) itself: PathBuf,
}

impl Programs {
    pub(crate) fn find(options: &Options) -> Result<Self> {
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("this crate lies in no checkout")?;
        let provided = checkout.join(".provision");
        let newest = options.source.max(options.target);
        let client = CLIENTS.into_iter().find(|major| *major >= newest).unwrap_or(newest);
        let pgtandem = options.pgtandem.clone().unwrap_or_else(|| checkout.join("target/release/pgtandem"));
        if !pgtandem.is_file() {
            bail!("{} is missing: run `make build`", pgtandem.display());
        }
        let debian_pgcopydb = std::fs::canonicalize(provided.join("peer/usr/bin/pgcopydb")).ok();
        Ok(Self {
            source: installation(&provided, options.source)?,
            target: installation(&provided, options.target)?,
            client: resolved(&provided.join(format!("client/{client}/bin")))?,
            pgtandem: resolved(&pgtandem)?,
            pgcopydb: peer(&provided, options.source),
            other_pgcopydb: on_search_path("pgcopydb").filter(|found| Some(found) != debian_pgcopydb.as_ref()),
            debian_pgcopydb,
            itself: std::env::current_exe().context("finding this program itself")?,
        })
    }

    pub(crate) fn pgbench(&self) -> PathBuf {
        self.client.join("pgbench")
    }

    /// Where the source finds decoding plugins that it did not come with.
    pub(crate) fn plugins(&self) -> Option<&Path> {
        self.pgcopydb.as_ref().map(|peer| peer.plugins.as_path())
    }

    /// The search path for a program that looks for `pg_dump` by itself.
    pub(crate) fn search_path(&self) -> Result<OsString> {
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(self.client.clone()).chain(std::env::split_paths(&inherited));
        std::env::join_paths(folders).context("the search path")
    }
}

fn installation(provided: &Path, major: u16) -> Result<Installation> {
    Ok(Installation { major, bin: resolved(&provided.join(format!("server/{major}/bin")))? })
}

fn peer(provided: &Path, source: u16) -> Option<Peer> {
    let root = std::fs::canonicalize(provided.join("peer")).ok()?;
    let peer =
        Peer { program: root.join("usr/bin/pgcopydb"), plugins: root.join(format!("usr/lib/postgresql/{source}/lib")) };
    (peer.program.is_file() && peer.plugins.join("wal2json.so").is_file()).then_some(peer)
}

/// The first program of this name, with links resolved.
fn on_search_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).find_map(|folder| std::fs::canonicalize(folder.join(name)).ok())
}

fn resolved(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| format!("{} is missing: run scripts/provision.sh", path.display()))
}
