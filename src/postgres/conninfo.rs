//! libpq connection strings, both forms: `postgresql://…` and `host=… dbname=…`.
//! See <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>.

/// A parsed connection string. `Debug` and `Display` never show the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnInfo {}
