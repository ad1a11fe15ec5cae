//! How a drain or a copy went.

/// How it went.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It is done, in so many seconds.
    Done(f64),
    /// Not within so many seconds.
    Over(f64),
    /// It could not, for this reason.
    Failed(String),
}
