//! The values of the keywords: texts to types, with libpq's defaults, and back to texts.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::syntax::Pairs;
use super::{
    Address, Ambient, CONNECT_TIMEOUT, ConnInfo, Host, InvalidConnInfo, Keepalive, Password, Root, SslOptions,
};

type Result<T> = std::result::Result<T, InvalidConnInfo>;

/// An enumeration of libpq: its words in both directions.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word as libpq spells it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }

            fn read(pairs: &Pairs, keyword: &str) -> Result<Option<Self>> {
                let Some(text) = last(pairs, keyword) else { return Ok(None) };
                match Self::ALL.iter().find(|one| one.as_str() == text) {
                    Some(one) => Ok(Some(*one)),
                    None => Err(one_of(keyword, &Self::ALL.iter().map(|one| one.as_str()).collect::<Vec<_>>())),
                }
            }
        }
    };
}

words! {
    /// `sslmode`
    SslMode {
        /// Never TLS.
        Disable = "disable",
        /// TLS only if the server refuses without.
        Allow = "allow",
        /// TLS if the server has it.
        Prefer = "prefer",
        /// TLS or nothing.
        Require = "require",
        /// TLS from a server that a trusted authority vouches for.
        VerifyCa = "verify-ca",
        /// The same, and the certificate is for the host's name.
        VerifyFull = "verify-full",
    }
}

words! {
    /// `sslnegotiation`
    SslNegotiation {
        /// The server is asked first (SSLRequest).
        Postgres = "postgres",
        /// TLS from the first byte; servers since 17.
        Direct = "direct",
    }
}

words! {
    /// `ssl_min_protocol_version` and `ssl_max_protocol_version`; older ones than 1.2 are never spoken.
    TlsVersion {
        /// TLS 1.2
        Tls12 = "TLSv1.2",
        /// TLS 1.3
        Tls13 = "TLSv1.3",
    }
}

words! {
    /// `channel_binding`
    ChannelBinding {
        /// Never.
        Disable = "disable",
        /// Where the server offers it.
        Prefer = "prefer",
        /// The password is never given to a server that does not bind it to the TLS connection.
        Require = "require",
    }
}

words! {
    /// `target_session_attrs`
    SessionAttrs {
        /// The first server that answers.
        Any = "any",
        /// One that accepts writes.
        ReadWrite = "read-write",
        /// One that does not.
        ReadOnly = "read-only",
        /// Not a standby.
        Primary = "primary",
        /// A standby.
        Standby = "standby",
        /// A standby if there is one.
        PreferStandby = "prefer-standby",
    }
}

words! {
    /// `load_balance_hosts`
    LoadBalance {
        /// The hosts in the order given.
        Disable = "disable",
        /// In random order.
        Random = "random",
    }
}

fn invalid(message: impl Into<String>) -> InvalidConnInfo {
    InvalidConnInfo(message.into())
}

/// The value is not repeated: after a slip in the quoting it could be a piece of the password.
fn one_of(keyword: &str, words: &[&str]) -> InvalidConnInfo {
    invalid(format!("{keyword} must be one of {}", words.join(", ")))
}

/// The last value of `keyword`; an empty one counts as not given, as with libpq.
fn last<'a>(pairs: &'a Pairs, keyword: &str) -> Option<&'a str> {
    pairs.iter().rev().find(|(known, _)| *known == keyword).map(|(_, value)| value.as_str()).filter(|v| !v.is_empty())
}

/// Types every value.
pub(super) fn from_pairs(pairs: &Pairs, ambient: &Ambient) -> Result<ConnInfo> {
    let Some(user) = last(pairs, "user").map(str::to_owned).or_else(|| ambient.user.clone()) else {
        return Err(invalid("no user is given and the system does not say who runs this; add user=…"));
    };
    refuse_gssencmode(pairs)?;
    let passfile = last(pairs, "passfile")
        .map(PathBuf::from)
        .or_else(|| ambient.passfile.clone())
        .or_else(|| ambient.home.as_ref().map(|home| home.join(".pgpass")));
    Ok(ConnInfo {
        hosts: hosts(pairs)?,
        database: last(pairs, "dbname").unwrap_or(&user).to_owned(),
        user,
        password: last(pairs, "password").map(Password::new),
        passfile,
        home: ambient.home.clone(),
        options: last(pairs, "options").map(str::to_owned),
        connect_timeout: connect_timeout(pairs)?,
        ssl: ssl(pairs)?,
        channel_binding: ChannelBinding::read(pairs, "channel_binding")?.unwrap_or(ChannelBinding::Prefer),
        keepalive: keepalive(pairs)?,
        session_attrs: SessionAttrs::read(pairs, "target_session_attrs")?.unwrap_or(SessionAttrs::Any),
        load_balance: LoadBalance::read(pairs, "load_balance_hosts")?.unwrap_or(LoadBalance::Disable),
    })
}

fn refuse_gssencmode(pairs: &Pairs) -> Result<()> {
    match last(pairs, "gssencmode") {
        None | Some("disable" | "prefer") => Ok(()),
        Some(_) => Err(invalid("gssencmode must be disable or prefer: GSSAPI encryption is not supported, use TLS")),
    }
}

/// `host`, `hostaddr` and `port` are lists; the number of ports is one or that of the hosts.
fn hosts(pairs: &Pairs) -> Result<Vec<Host>> {
    let list = |keyword| last(pairs, keyword).map(|text| text.split(',').map(str::trim).collect::<Vec<_>>());
    let (names, numeric, ports) = (list("host"), list("hostaddr"), list("port").unwrap_or_default());
    let count = numeric.as_ref().or(names.as_ref()).map_or(1, Vec::len);
    if let (Some(names), Some(numeric)) = (&names, &numeric)
        && names.len() != numeric.len()
    {
        return Err(invalid(format!("{} hosts do not go with {} hostaddr values", names.len(), numeric.len())));
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(invalid(format!("{} ports do not go with {count} hosts", ports.len())));
    }
    let at = |list: &Option<Vec<&str>>, index: usize| -> Option<String> {
        list.as_ref()?.get(index).filter(|text| !text.is_empty()).map(|text| (*text).to_owned())
    };
    (0..count)
        .map(|index| {
            let numeric = at(&numeric, index)
                .map(|text| {
                    text.parse::<IpAddr>().map_err(|_| invalid("hostaddr must be a numeric IPv4 or IPv6 address"))
                })
                .transpose()?;
            let address = match (at(&names, index), numeric) {
                (Some(name), _) if name.starts_with('/') => Address::Unix(PathBuf::from(name)),
                (Some(name), _) => Address::Tcp(name),
                (None, Some(numeric)) => Address::Tcp(numeric.to_string()),
                (None, None) => default_address(),
            };
            let port = ports.get(index).or(if ports.len() == 1 { ports.first() } else { None });
            Ok(Host { address, numeric, port: port_number(port.copied().unwrap_or_default())? })
        })
        .collect()
}

fn port_number(text: &str) -> Result<u16> {
    match text {
        "" => Ok(5432),
        text => match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(invalid(
                "a port is a number from 1 to 65535; if it is one, the user or password of the URL may have a sign \
                 that must be percent-encoded (%40 for @, %2F for /, %3A for :)",
            )),
        },
    }
}

/// The socket folder of the distributions if it is there, else this machine's loopback.
fn default_address() -> Address {
    let folder = Path::new("/var/run/postgresql");
    if folder.is_dir() { Address::Unix(folder.to_owned()) } else { Address::Tcp("localhost".to_owned()) }
}

fn integer(pairs: &Pairs, keyword: &str) -> Result<Option<i64>> {
    last(pairs, keyword)
        .map(|text| {
            text.trim().parse::<i32>().map(i64::from).map_err(|_| invalid(format!("{keyword} must be a whole number")))
        })
        .transpose()
}

/// Seconds; zero and less mean no limit, and one second is taken as two, as with libpq.
fn connect_timeout(pairs: &Pairs) -> Result<Option<Duration>> {
    Ok(match integer(pairs, "connect_timeout")? {
        None => Some(CONNECT_TIMEOUT),
        Some(seconds) if seconds <= 0 => None,
        Some(seconds) => Some(Duration::from_secs(seconds.max(2).unsigned_abs())),
    })
}

fn switch(pairs: &Pairs, keyword: &str) -> Result<bool> {
    match last(pairs, keyword) {
        None | Some("1") => Ok(true),
        Some("0") => Ok(false),
        Some(_) => Err(one_of(keyword, &["0", "1"])),
    }
}

/// `tcp_user_timeout`, unless the connection string says otherwise. A server that does not read for a while, such as one
/// that waits for a lock, is not gone.
const USER_TIMEOUT: Duration = Duration::from_secs(300);

/// Ours are shorter than the system's: a half-open connection of a long move must not wait for hours.
fn keepalive(pairs: &Pairs) -> Result<Keepalive> {
    let seconds = |keyword, default: u64| -> Result<Option<Duration>> {
        Ok(match integer(pairs, keyword)? {
            None => Some(Duration::from_secs(default)),
            Some(seconds) if seconds <= 0 => None,
            Some(seconds) => Some(Duration::from_secs(seconds.unsigned_abs())),
        })
    };
    Ok(Keepalive {
        enabled: switch(pairs, "keepalives")?,
        idle: seconds("keepalives_idle", 30)?,
        interval: seconds("keepalives_interval", 10)?,
        count: match integer(pairs, "keepalives_count")? {
            None => Some(3),
            Some(count) => u32::try_from(count).ok().filter(|count| *count > 0),
        },
        user_timeout: match integer(pairs, "tcp_user_timeout")? {
            None => Some(USER_TIMEOUT),
            Some(milliseconds) if milliseconds <= 0 => None,
            Some(milliseconds) => Some(Duration::from_millis(milliseconds.unsigned_abs())),
        },
    })
}

fn ssl(pairs: &Pairs) -> Result<SslOptions> {
    let root = match last(pairs, "sslrootcert") {
        None => Root::Default,
        Some("system") => Root::System,
        Some(file) => Root::File(PathBuf::from(file)),
    };
    let default_mode = if root == Root::System { SslMode::VerifyFull } else { SslMode::Prefer };
    let mode = SslMode::read(pairs, "sslmode")?.unwrap_or(default_mode);
    if root == Root::System && mode != SslMode::VerifyFull {
        return Err(invalid(format!(
            "sslmode={} is too weak for sslrootcert=system, with which anyone can get a certificate; use verify-full",
            mode.as_str()
        )));
    }
    let negotiation = SslNegotiation::read(pairs, "sslnegotiation")?.unwrap_or(SslNegotiation::Postgres);
    if negotiation == SslNegotiation::Direct && mode < SslMode::Require {
        return Err(invalid("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full"));
    }
    let no_certificate = match last(pairs, "sslcertmode") {
        None | Some("allow") => false,
        Some("disable") => true,
        Some(_) => return Err(invalid("sslcertmode must be allow or disable; require is not supported")),
    };
    let (min_version, max_version) = versions(pairs)?;
    Ok(SslOptions {
        mode,
        root,
        certificate: last(pairs, "sslcert").map(PathBuf::from),
        key: last(pairs, "sslkey").map(PathBuf::from),
        no_certificate,
        negotiation,
        sni: switch(pairs, "sslsni")?,
        min_version,
        max_version,
    })
}

fn versions(pairs: &Pairs) -> Result<(TlsVersion, TlsVersion)> {
    // An old lower bound allows what we speak; an old upper bound forbids it.
    let min = match last(pairs, "ssl_min_protocol_version") {
        Some("TLSv1" | "TLSv1.1") | None => TlsVersion::Tls12,
        Some(_) => TlsVersion::read(pairs, "ssl_min_protocol_version")?.unwrap_or(TlsVersion::Tls12),
    };
    let max = TlsVersion::read(pairs, "ssl_max_protocol_version")?.unwrap_or(TlsVersion::Tls13);
    if min > max {
        return Err(invalid("ssl_min_protocol_version is above ssl_max_protocol_version"));
    }
    Ok((min, max))
}

/// What a URL must carry in its parameters so that it reads back the same; defaults are left out.
pub(super) fn parameters(conninfo: &ConnInfo) -> Vec<(&'static str, String)> {
    let mut found: Vec<(&'static str, String)> = Vec::new();
    let mut add = |keyword, value: Option<String>| found.extend(value.map(|value| (keyword, value)));
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let unless = |given: bool, value: &str| (!given).then(|| value.to_owned());

    let numeric: Vec<String> =
        conninfo.hosts.iter().map(|host| host.numeric.map(|ip| ip.to_string()).unwrap_or_default()).collect();
    add("hostaddr", numeric.iter().any(|ip| !ip.is_empty()).then(|| numeric.join(",")));
    let default_passfile = conninfo.home.as_ref().map(|home| home.join(".pgpass"));
    add("passfile", path(&conninfo.passfile).filter(|_| conninfo.passfile != default_passfile));
    add("options", conninfo.options.clone());
    add(
        "connect_timeout",
        match conninfo.connect_timeout {
            Some(CONNECT_TIMEOUT) => None,
            timeout => Some(seconds(timeout)),
        },
    );

    let ssl = &conninfo.ssl;
    add("sslmode", unless(ssl.mode == SslMode::Prefer, ssl.mode.as_str()));
    add(
        "sslrootcert",
        match &ssl.root {
            Root::Default => None,
            Root::System => Some("system".to_owned()),
            Root::File(file) => Some(file.display().to_string()),
        },
    );
    add("sslcert", path(&ssl.certificate));
    add("sslkey", path(&ssl.key));
    add("sslcertmode", unless(!ssl.no_certificate, "disable"));
    add("sslnegotiation", unless(ssl.negotiation == SslNegotiation::Postgres, ssl.negotiation.as_str()));
    add("sslsni", unless(ssl.sni, "0"));
    add("ssl_min_protocol_version", unless(ssl.min_version == TlsVersion::Tls12, ssl.min_version.as_str()));
    add("ssl_max_protocol_version", unless(ssl.max_version == TlsVersion::Tls13, ssl.max_version.as_str()));
    let binding = conninfo.channel_binding;
    add("channel_binding", unless(binding == ChannelBinding::Prefer, binding.as_str()));

    let keepalive = &conninfo.keepalive;
    let timing =
        |value: Option<Duration>, default| unless(value == Some(Duration::from_secs(default)), &seconds(value));
    add("keepalives", unless(keepalive.enabled, "0"));
    add("keepalives_idle", timing(keepalive.idle, 30));
    add("keepalives_interval", timing(keepalive.interval, 10));
    add("keepalives_count", unless(keepalive.count == Some(3), &keepalive.count.unwrap_or(0).to_string()));
    let user_timeout = keepalive.user_timeout.unwrap_or_default();
    add("tcp_user_timeout", unless(user_timeout == USER_TIMEOUT, &user_timeout.as_millis().to_string()));

    let attrs = conninfo.session_attrs;
    add("target_session_attrs", unless(attrs == SessionAttrs::Any, attrs.as_str()));
    let balance = conninfo.load_balance;
    add("load_balance_hosts", unless(balance == LoadBalance::Disable, balance.as_str()));
    found
}

/// Zero stands for no limit, as libpq spells it.
fn seconds(value: Option<Duration>) -> String {
    value.unwrap_or_default().as_secs().to_string()
}
