//! Who follows the source. Each gets a slot that stands where the backlog begins, and a target as it stood then.

pub(crate) mod native;
pub(crate) mod null;
pub(crate) mod pgcopydb;
pub(crate) mod pgtandem;

use anyhow::{Result, bail};
use tokio_postgres::Client;

use crate::process::Background;
use crate::servers::{Server, Servers};
use crate::stage::{DONE, Stage};

/// The contenders, in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub(crate) enum Contender {
    /// The server's own subscription
    Native,
    /// This project
    Pgtandem,
    /// The same with two workers
    #[value(name = "pgtandem-2")]
    PgtandemTwo,
    /// pgcopydb follow, as Debian has it
    Pgcopydb,
    /// Reads everything and applies nothing: what decoding alone takes
    Null,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native subscription",
            Self::Pgtandem => "pgtandem",
            Self::PgtandemTwo => "pgtandem, 2 workers",
            Self::Pgcopydb => "pgcopydb",
            Self::Null => "null reader",
        }
    }

    /// The server that it applies to.
    pub(crate) fn target(self, servers: &Servers) -> Option<&Server> {
        match self {
            Self::Native | Self::Pgcopydb => Some(&servers.target),
            Self::Pgtandem | Self::PgtandemTwo => Some(&servers.pgtandem_target),
            Self::Null => None,
        }
    }

    /// The slot that it reads in a drain.
    pub(crate) fn slot(self) -> &'static str {
        match self {
            Self::Pgtandem | Self::PgtandemTwo => pgtandem::SLOT,
            Self::Native | Self::Pgcopydb | Self::Null => "drain",
        }
    }

    /// Whether it is this project, which has a state and a slot of its own.
    pub(crate) fn is_pgtandem(self) -> bool {
        matches!(self, Self::Pgtandem | Self::PgtandemTwo)
    }

    /// The decoding plugin of that slot.
    pub(crate) fn plugin(self) -> &'static str {
        match self {
            Self::Pgcopydb => pgcopydb::PLUGIN,
            Self::Native | Self::Pgtandem | Self::PgtandemTwo | Self::Null => "pgoutput",
        }
    }

    /// Whether it must get done: a peer that cannot is told in the table, and no more.
    pub(crate) fn must_drain(self) -> bool {
        self != Self::Pgcopydb
    }

    /// Does everything that is not measured. The slot and the target are ready.
    pub(crate) async fn prepare<'a>(self, stage: &Stage<'a>) -> Result<Ready<'a>> {
        match self {
            Self::Native => native::Subscription::create(stage, self.slot()).await.map(Ready::Native),
            Self::Pgtandem => pgtandem::Commands::of(stage, 1).map(Ready::Pgtandem),
            Self::PgtandemTwo => pgtandem::Commands::of(stage, 2).map(Ready::Pgtandem),
            Self::Pgcopydb => pgcopydb::Follow::prepare(stage, self.slot()).await.map(Ready::Pgcopydb),
            Self::Null => Ok(Ready::Null(null::Order::of(stage, self.slot()))),
        }
    }
}

/// A contender that waits for its start.
pub(crate) enum Ready<'a> {
    Native(native::Subscription<'a>),
    Pgtandem(pgtandem::Commands),
    Pgcopydb(pgcopydb::Follow),
    Null(null::Order),
}

impl<'a> Ready<'a> {
    /// From here on it is measured.
    pub(crate) async fn start(self) -> Result<Running<'a>> {
        match self {
            Self::Native(subscription) => subscription.enable().await.map(Running::Native),
            Self::Pgtandem(commands) => commands.run().map(Running::Daemon),
            Self::Pgcopydb(follow) => follow.start().map(Running::Daemon),
            Self::Null(order) => order.start().await.map(Running::Null),
        }
    }
}

/// A contender that drains.
pub(crate) enum Running<'a> {
    Native(native::Subscription<'a>),
    Daemon(Background),
    Null(null::Reader),
}

impl Running<'_> {
    /// The program that does it; none where the server does.
    pub(crate) fn process_id(&self) -> Option<u32> {
        match self {
            Self::Native(_) => None,
            Self::Daemon(daemon) => daemon.id(),
            Self::Null(reader) => reader.process_id(),
        }
    }

    /// Whether the last transaction of the backlog has arrived.
    ///
    /// # Errors
    /// Its program ended before.
    pub(crate) async fn is_done(&mut self, target: Option<&Client>) -> Result<bool> {
        if let Self::Null(reader) = self {
            return reader.is_done();
        }
        let Some(target) = target else { bail!("there is no target to look at") };
        let ended = match self {
            Self::Daemon(daemon) => daemon.ended()?,
            _ => None,
        };
        // Looked at after that, for some end once they are done.
        let done = target.query_opt(&format!("SELECT FROM {DONE}"), &[]).await?.is_some();
        match ended {
            Some(status) if !done => bail!("it ended with {status}: {}", self.last_words()),
            _ => Ok(done),
        }
    }

    /// What it last said, where it says anything.
    pub(crate) fn last_words(&self) -> String {
        match self {
            Self::Native(subscription) => subscription.last_words(),
            Self::Daemon(daemon) => daemon.last_words(),
            Self::Null(reader) => reader.last_words(),
        }
    }

    /// Stops it; the slot is free soon after.
    pub(crate) async fn stop(self) -> Result<()> {
        match self {
            Self::Native(subscription) => subscription.drop().await,
            Self::Daemon(daemon) => daemon.stop().await.map(drop),
            Self::Null(reader) => reader.stop().await,
        }
    }
}
