//! One file per command; the only place that prints to stdout.

pub mod demo;
