//! The environment with which pg_dump, pg_restore and psql reach a server: libpq's variables, never the arguments,
//! which everyone on the machine can read.
//! See <https://www.postgresql.org/docs/current/libpq-envars.html>.

use std::path::Path;
use std::sync::atomic::Ordering;

use crate::postgres::conninfo::{Host, SessionAttrs, SslNegotiation};
use crate::postgres::tls::{Authorities, Tls};

use super::Server;

/// Every variable that libpq reads. A child gets only those of [`Server::child_environment`]: remove these first
/// (`Command::env_remove`), so that the `PG*` of whoever started us do not leak in.
pub const REMOVED_FROM_CHILDREN: &[&str] = &[
    "PGAPPNAME",
    "PGCHANNELBINDING",
    "PGCLIENTENCODING",
    "PGCONNECT_TIMEOUT",
    "PGDATABASE",
    "PGDATESTYLE",
    "PGGEQO",
    "PGGSSDELEGATION",
    "PGGSSENCMODE",
    "PGGSSLIB",
    "PGHOST",
    "PGHOSTADDR",
    "PGKRBSRVNAME",
    "PGLOADBALANCEHOSTS",
    "PGLOCALEDIR",
    "PGMAXPROTOCOLVERSION",
    "PGMINPROTOCOLVERSION",
    "PGOAUTHDEBUG",
    "PGOPTIONS",
    "PGPASSFILE",
    "PGPASSWORD",
    "PGPORT",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSSLCERT",
    "PGSSLCERTMODE",
    "PGSSLCOMPRESSION",
    "PGSSLCRL",
    "PGSSLCRLDIR",
    "PGSSLKEY",
    "PGSSLKEYLOGFILE",
    "PGSSLMAXPROTOCOLVERSION",
    "PGSSLMINPROTOCOLVERSION",
    "PGSSLMODE",
    "PGSSLNEGOTIATION",
    "PGSSLROOTCERT",
    "PGSSLSNI",
    "PGSYSCONFDIR",
    "PGTARGETSESSIONATTRS",
    "PGTZ",
    "PGUSER",
];

/// Where the distributions keep the system's authorities as one file: pg_dump before 16 knows no `system`.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

impl Server {
    /// The environment (`PGHOST`, `PGPASSWORD`, …) with which pg_dump, pg_restore and psql reach this server.
    /// It is for a child process only: it holds the password. Remove [`REMOVED_FROM_CHILDREN`] first.
    #[must_use]
    pub fn child_environment(&self, role: &str) -> Vec<(String, String)> {
        let conninfo = self.conninfo();
        let mut found: Vec<(String, String)> = Vec::new();
        let mut set = |name: &str, value: String| found.push((name.to_owned(), value));
        let list = |of: &dyn Fn(&Host) -> String| conninfo.hosts().iter().map(of).collect::<Vec<_>>().join(",");

        set("PGAPPNAME", self.application_name(role));
        set("PGHOST", list(&Host::name));
        set("PGPORT", list(&|host| host.port.to_string()));
        let numeric = list(&|host| host.numeric.map(|ip| ip.to_string()).unwrap_or_default());
        if numeric.bytes().any(|b| b != b',') {
            set("PGHOSTADDR", numeric);
        }
        set("PGDATABASE", conninfo.database().to_owned());
        set("PGUSER", conninfo.user().to_owned());
        match (conninfo.password(), conninfo.passfile()) {
            (Some(password), _) => set("PGPASSWORD", password.expose().to_owned()),
            (None, Some(file)) => set("PGPASSFILE", file.display().to_string()),
            (None, None) => {}
        }
        set("PGCLIENTENCODING", "UTF8".to_owned());
        set("PGCONNECT_TIMEOUT", conninfo.connect_timeout().unwrap_or_default().as_secs().to_string());
        // A role's or a database's default must not stop a restore, nor print money in the manner of one side.
        let pinned = "-c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=0 -c lc_monetary=C"
            .to_owned()
            + if self.0.knows_transaction_timeout.load(Ordering::Relaxed) { " -c transaction_timeout=0" } else { "" };
        set("PGOPTIONS", conninfo.options().map_or_else(|| pinned.clone(), |options| format!("{options} {pinned}")));
        set("PGGSSENCMODE", "disable".to_owned());
        set("PGCHANNELBINDING", conninfo.channel_binding().as_str().to_owned());
        if conninfo.session_attrs() != SessionAttrs::Any {
            set("PGTARGETSESSIONATTRS", conninfo.session_attrs().as_str().to_owned());
        }
        found.extend(self.child_ssl());
        found
    }

    fn child_ssl(&self) -> Vec<(String, String)> {
        let ssl = self.conninfo().ssl();
        let mut found = vec![("PGSSLMODE".to_owned(), ssl.mode.as_str().to_owned())];
        let mut set = |name: &str, value: String| found.push((name.to_owned(), value));
        match self.0.tls.as_ref().map(Tls::authorities) {
            Some(Authorities::File(file)) => set("PGSSLROOTCERT", file.display().to_string()),
            Some(Authorities::System) => {
                let bundle = BUNDLES.into_iter().find(|file| Path::new(file).is_file());
                set("PGSSLROOTCERT", bundle.unwrap_or("system").to_owned());
            }
            Some(Authorities::Unchecked) | None => {}
        }
        if let Some(file) = &ssl.certificate {
            set("PGSSLCERT", file.display().to_string());
        }
        if let Some(file) = &ssl.key {
            set("PGSSLKEY", file.display().to_string());
        }
        if ssl.no_certificate {
            set("PGSSLCERTMODE", "disable".to_owned());
        }
        if ssl.negotiation == SslNegotiation::Direct {
            set("PGSSLNEGOTIATION", "direct".to_owned());
        }
        if !ssl.sni {
            set("PGSSLSNI", "0".to_owned());
        }
        set("PGSSLMINPROTOCOLVERSION", ssl.min_version.as_str().to_owned());
        set("PGSSLMAXPROTOCOLVERSION", ssl.max_version.as_str().to_owned());
        found
    }
}
