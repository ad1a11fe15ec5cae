//! What there is to copy. No data set has foreign keys: some contenders check them within the copy, others add them later.

mod large;
mod mixed;
mod tables;
mod text;

use anyhow::Result;

use super::contender::Contender;
use crate::options::Options;
use crate::workload::Place;

/// The data sets, by the names of the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Dataset {
    /// pgbench's tables, and one of 2 million wide rows with four indexes
    Mixed,
    /// 2,000 small tables
    Small,
    /// One table of 4 GiB
    Large,
    /// Long texts, jsonb, arrays
    Text,
    /// 10,000 tables, for the time until the first row is on its way; pgtandem alone
    Many,
    /// The one large table; pgtandem, undisturbed and killed twice
    Killed,
    /// The mixed one while pgbench works on the source
    Busy,
}

impl Dataset {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Small => "small",
            Self::Large => "large",
            Self::Text => "text",
            Self::Many => "many",
            Self::Killed => "killed",
            Self::Busy => "busy",
        }
    }

    /// What it is at this size, in a line.
    pub(crate) fn title(self, options: &Options) -> String {
        match self {
            Self::Mixed => mixed::title(options),
            Self::Small => tables::small_title(options),
            Self::Large => large::title(options),
            Self::Text => text::title(options),
            Self::Many => tables::many_title(options),
            Self::Killed => format!("{}, killed at 50 % and again at 90 %", large::title(options)),
            Self::Busy => format!("{}, with four clients of pgbench on the source", mixed::title(options)),
        }
    }

    /// Whether it says anything about this contender.
    pub(crate) fn is_for(self, contender: Contender) -> bool {
        match self {
            Self::Many => contender == Contender::Pgtandem,
            Self::Killed => matches!(contender, Contender::Pgtandem | Contender::PgtandemKilled),
            _ => contender != Contender::PgtandemKilled,
        }
    }

    /// Whether it is for this contender if nobody is named.
    pub(crate) fn asks(self, contender: Contender) -> bool {
        match self {
            Self::Busy => matches!(contender, Contender::Pipe | Contender::Pgtandem),
            Self::Large if contender == Contender::PgcopydbSplit => true,
            _ => !contender.only_if_named(),
        }
    }

    /// Whether one copy goes before that is not counted. Where planning is what counts, how the log is written does not.
    pub(crate) fn is_warmed_up(self) -> bool {
        self != Self::Many
    }

    /// Whether pgbench works on the source meanwhile.
    pub(crate) fn is_busy(self) -> bool {
        self == Self::Busy
    }

    /// Fills an empty database.
    pub(crate) async fn fill(self, place: &Place<'_>) -> Result<()> {
        match self {
            Self::Mixed | Self::Busy => mixed::fill(place).await,
            Self::Small => tables::fill_small(place).await,
            Self::Large | Self::Killed => large::fill(place).await,
            Self::Text => text::fill(place).await,
            Self::Many => tables::fill_many(place).await,
        }
    }
}
