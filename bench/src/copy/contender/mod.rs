//! Who copies: each finds a full source and an empty target, and is done when the target holds all that the source holds,
//! with its indexes and keys.

mod dump;
mod native;
pub(crate) mod pgcopydb;
pub(super) mod pgtandem;

use anyhow::Result;

use self::pgcopydb::{Peers, Which};
use super::ground::Ground;
use super::killed;
use super::stopwatch::Stopwatch;

/// The contenders, in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub(crate) enum Contender {
    /// pg_dump -Fc | pg_restore
    Pipe,
    /// The same without compression; only if it is named
    PipePlain,
    /// pg_dump -Fd -j, then pg_restore -j
    Directory,
    /// The same without compression
    DirectoryPlain,
    /// pgcopydb clone, as Debian has it
    Pgcopydb,
    /// The newest pgcopydb there is, with large tables split; only of the large table, if it is not named
    PgcopydbSplit,
    /// pgcopydb clone, the newer one on the search path
    PgcopydbNew,
    /// The same with COPY in binary
    PgcopydbBinary,
    /// pg_dump -s, then a subscription that copies
    Native,
    /// This project
    Pgtandem,
    /// The same, killed twice
    #[value(skip)]
    PgtandemKilled,
}

impl Contender {
    pub(crate) const ALL: [Self; 11] = [
        Self::Pipe,
        Self::PipePlain,
        Self::Directory,
        Self::DirectoryPlain,
        Self::Pgcopydb,
        Self::PgcopydbSplit,
        Self::PgcopydbNew,
        Self::PgcopydbBinary,
        Self::Native,
        Self::Pgtandem,
        Self::PgtandemKilled,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pipe => "pipe",
            Self::PipePlain => "pipe, not compressed",
            Self::Directory => "directory",
            Self::DirectoryPlain => "directory, not compressed",
            Self::Pgcopydb => "pgcopydb",
            Self::PgcopydbSplit => "pgcopydb, large tables split",
            Self::PgcopydbNew => "newer pgcopydb",
            Self::PgcopydbBinary => "newer pgcopydb, binary",
            Self::Native => "native subscription",
            Self::Pgtandem => "pgtandem",
            Self::PgtandemKilled => "pgtandem, killed twice",
        }
    }

    /// Whether it takes part only where it is asked for by its name.
    pub(crate) fn only_if_named(self) -> bool {
        matches!(self, Self::PipePlain | Self::PgcopydbSplit)
    }

    /// Whether this machine has it.
    pub(crate) fn can(self, peers: &Peers) -> bool {
        match self {
            Self::Pgcopydb => peers.program(Which::Debian).is_some(),
            Self::PgcopydbSplit => peers.program(Which::NewestSplit).is_some(),
            Self::PgcopydbNew => peers.program(Which::Newer).is_some(),
            Self::PgcopydbBinary => peers.program(Which::NewerBinary).is_some(),
            _ => true,
        }
    }

    /// Copies everything but statistics, which it may gather or not.
    pub(crate) async fn copy(self, ground: &Ground<'_>, clock: &mut Stopwatch<'_>) -> Result<()> {
        match self {
            Self::Pipe => dump::pipe(ground, clock, dump::Compression::Default).await,
            Self::PipePlain => dump::pipe(ground, clock, dump::Compression::None).await,
            Self::Directory => dump::directory(ground, clock, dump::Compression::Default).await,
            Self::DirectoryPlain => dump::directory(ground, clock, dump::Compression::None).await,
            Self::Pgcopydb => pgcopydb::clone(ground, clock, Which::Debian).await,
            Self::PgcopydbSplit => pgcopydb::clone(ground, clock, Which::NewestSplit).await,
            Self::PgcopydbNew => pgcopydb::clone(ground, clock, Which::Newer).await,
            Self::PgcopydbBinary => pgcopydb::clone(ground, clock, Which::NewerBinary).await,
            Self::Native => native::copy(ground, clock).await,
            Self::Pgtandem => pgtandem::copy(ground, clock).await,
            Self::PgtandemKilled => killed::copy(ground, clock).await,
        }
    }

    /// In how many sessions the target is analyzed for it: the naive way stays naive.
    pub(crate) fn analyzed_by(self, jobs: u16) -> u16 {
        match self {
            Self::Pipe | Self::PipePlain => 1,
            _ => jobs,
        }
    }

    /// Brings a target up to date after the source has come to rest; false for those who cannot.
    pub(crate) async fn catch_up(self, ground: &Ground<'_>) -> Result<bool> {
        match self {
            Self::Pgtandem => pgtandem::catch_up(ground).await.map(|()| true),
            _ => Ok(false),
        }
    }

    /// Removes what it left on the servers and in the folder, also after it failed.
    pub(crate) async fn clean(self, ground: &Ground<'_>) -> Result<()> {
        match self {
            Self::Pipe | Self::PipePlain => Ok(()),
            Self::Directory | Self::DirectoryPlain => dump::clean(ground),
            Self::Pgcopydb | Self::PgcopydbSplit | Self::PgcopydbNew | Self::PgcopydbBinary => pgcopydb::clean(ground),
            Self::Native => native::clean(ground).await,
            Self::Pgtandem | Self::PgtandemKilled => pgtandem::clean(ground).await,
        }
    }
}
