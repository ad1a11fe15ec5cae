//! Every keyword of libpq, and what we do with it: act on it, ignore it for a reason, or refuse it for a reason.
//! See <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS>.

/// What a keyword of a connection string means to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// We do what libpq does.
    Acted,
    /// Accepted without an effect: the reason says why that is safe.
    Ignored,
    /// Not supported; the reason is said to the user.
    Refused(&'static str),
}

use Meaning::{Acted, Ignored, Refused};

const NO_KERBEROS: &str = "GSSAPI and SSPI are not supported; use a password or a client certificate";
const NO_CRL: &str = "certificate revocation lists are not supported";
const NO_OAUTH: &str = "OAuth is not supported; use a password or a client certificate";
const NO_SCRAM_KEYS: &str = "SCRAM pass-through keys are not supported; give the password";

/// All keywords, in the order of libpq's documentation.
pub(super) const KEYWORDS: &[(&str, Meaning)] = &[
    ("host", Acted),
    ("hostaddr", Acted),
    ("port", Acted),
    ("dbname", Acted),
    ("user", Acted),
    ("password", Acted),
    ("passfile", Acted),
    ("require_auth", Refused("it is not supported; use channel_binding=require or sslmode=verify-full instead")),
    ("channel_binding", Acted),
    ("connect_timeout", Acted),
    // Every connection of ours pins UTF8.
    ("client_encoding", Ignored),
    ("options", Acted),
    // Every connection of ours is called after the move and its role.
    ("application_name", Ignored),
    ("fallback_application_name", Ignored),
    ("keepalives", Acted),
    ("keepalives_idle", Acted),
    ("keepalives_interval", Acted),
    ("keepalives_count", Acted),
    ("tcp_user_timeout", Acted),
    ("replication", Refused("pgtandem opens replication connections by itself; remove it")),
    ("gssencmode", Acted),
    ("sslmode", Acted),
    ("sslnegotiation", Acted),
    // libpq ignores it too.
    ("sslcompression", Ignored),
    ("sslcert", Acted),
    ("sslkey", Acted),
    ("sslkeylogfile", Refused("session keys are never written to a file")),
    (
        "sslpassword",
        Refused("encrypted client keys are not supported; give a key without a passphrase, readable by its owner only"),
    ),
    ("sslcertmode", Acted),
    ("sslrootcert", Acted),
    ("sslcrl", Refused(NO_CRL)),
    ("sslcrldir", Refused(NO_CRL)),
    ("sslsni", Acted),
    ("requirepeer", Refused("it is not supported for Unix sockets")),
    ("ssl_min_protocol_version", Acted),
    ("ssl_max_protocol_version", Acted),
    // Protocol 3.0 is spoken to every server.
    ("min_protocol_version", Ignored),
    ("max_protocol_version", Ignored),
    // They matter only with GSSAPI, which is never used.
    ("krbsrvname", Ignored),
    ("gsslib", Ignored),
    ("gssdelegation", Refused(NO_KERBEROS)),
    ("scram_client_key", Refused(NO_SCRAM_KEYS)),
    ("scram_server_key", Refused(NO_SCRAM_KEYS)),
    ("service", Refused("service files are not read; write the connection string out")),
    ("servicefile", Refused("service files are not read; write the connection string out")),
    ("target_session_attrs", Acted),
    ("load_balance_hosts", Acted),
    ("oauth_issuer", Refused(NO_OAUTH)),
    ("oauth_client_id", Refused(NO_OAUTH)),
    ("oauth_client_secret", Refused(NO_OAUTH)),
    ("oauth_scope", Refused(NO_OAUTH)),
];

/// The known keyword that `keyword` was probably meant to be.
pub(super) fn nearest(keyword: &str) -> Option<&'static str> {
    KEYWORDS
        .iter()
        .map(|(known, _)| (strsim::jaro_winkler(known, &keyword.to_lowercase()), *known))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
