//! The two written forms: a text to keywords with values, and back to a URL.
//!
//! What libpq accepts is accepted. An error never repeats the text, which may hold a password: a position or the
//! name of a known keyword has to do.

use super::keywords::{self, Meaning};
use super::{Address, ConnInfo, InvalidConnInfo, fields};

/// Keywords with values, in the order written; a keyword may come twice, the last one counts.
pub(super) type Pairs = Vec<(&'static str, String)>;

type Result<T> = std::result::Result<T, InvalidConnInfo>;

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(InvalidConnInfo(message.into()))
}

/// Reads either form.
pub(super) fn pairs(text: &str) -> Result<Pairs> {
    if text.contains('\0') {
        return invalid("a connection string cannot contain a zero byte");
    }
    let text = text.trim_start();
    let rest = ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    match rest {
        Some(rest) => uri(rest.trim_end()),
        None => match text.split_once("://") {
            Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+') => {
                invalid("a connection URL begins with postgresql:// or postgres://")
            }
            _ => words(text),
        },
    }
}

/// Finds the keyword in the table. `may_be_secret` withholds the text: it could be the rest of a password.
fn known(keyword: &str, may_be_secret: bool) -> Result<&'static str> {
    let found = keywords::KEYWORDS.iter().find(|(known, _)| *known == keyword);
    if let Some((known, meaning)) = found {
        return match meaning {
            Meaning::Refused(reason) => invalid(format!("the keyword {known} cannot be used: {reason}")),
            Meaning::Acted | Meaning::Ignored => Ok(known),
        };
    }
    let nearest = keywords::nearest(keyword);
    if may_be_secret {
        return invalid(
            "an unknown keyword follows the password; a password with spaces, quotes or signs such as & or = must be \
             quoted ('…') in the key=value form and percent-encoded in a URL",
        );
    }
    let nearest = nearest.map(|known| format!("; did you mean {known:?}?")).unwrap_or_default();
    invalid(format!("unknown keyword {keyword:?}{nearest}"))
}

/// `key = value key='quoted value'`, with backslashes as libpq reads them.
fn words(text: &str) -> Result<Pairs> {
    let mut pairs = Pairs::new();
    let mut secret = false;
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_ascii_whitespace()).unwrap_or(rest.len());
        let (keyword, after) = rest.split_at(end);
        let Some(value) = after.trim_start().strip_prefix('=') else {
            return if pairs.is_empty() || secret {
                invalid(
                    "this is neither a URL (postgresql://user@host/database) nor keywords with values \
                     (host=… dbname=…): a \"=\" is missing; values with spaces must be quoted ('…')",
                )
            } else {
                invalid(format!("a \"=\" is missing after {keyword:?}; values with spaces must be quoted ('…')"))
            };
        };
        let keyword = known(keyword, secret)?;
        let (value, more) = value_of_word(keyword, value.trim_start())?;
        secret |= keyword == "password";
        pairs.push((keyword, value));
        rest = more.trim_start();
    }
    Ok(pairs)
}

/// One value and what follows it.
fn value_of_word<'a>(keyword: &str, text: &'a str) -> Result<(String, &'a str)> {
    let quoted = text.strip_prefix('\'');
    let body = quoted.unwrap_or(text);
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted.is_some() => return Ok((value, body.get(at + 1..).unwrap_or_default())),
            c if quoted.is_none() && c.is_ascii_whitespace() => {
                return Ok((value, body.get(at..).unwrap_or_default()));
            }
            c => value.push(c),
        }
    }
    if quoted.is_some() { invalid(format!("the quoted value of {keyword} does not end")) } else { Ok((value, "")) }
}

/// What comes after `postgresql://`: `[user[:password]@][host[:port],…][/database][?keyword=value&…]`.
fn uri(text: &str) -> Result<Pairs> {
    let mut pairs = Pairs::new();
    let (credentials, rest) = match text.find(['@', '/']) {
        Some(at) if text.as_bytes().get(at) == Some(&b'@') => (text.get(..at), text.get(at + 1..).unwrap_or_default()),
        _ => (None, text),
    };
    if let Some(credentials) = credentials {
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (credentials, None),
        };
        push_unless_empty(&mut pairs, "user", percent_decode("user", user)?);
        if let Some(password) = password {
            push_unless_empty(&mut pairs, "password", percent_decode("password", password)?);
        }
    }
    let (authority_and_path, query) = match rest.split_once('?') {
        Some((front, query)) => (front, Some(query)),
        None => (rest, None),
    };
    // A second @ in front of the query means that the password was not percent-encoded; whatever we took for
    // hosts and database could be a piece of it.
    if authority_and_path.contains('@') {
        return invalid(
            "there is a sign in the user or password of the URL that must be percent-encoded: \
             %40 for @, %2F for /, %3A for :, %3F for ?, %23 for #, %25 for %",
        );
    }
    let (authority, path) = match authority_and_path.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (authority_and_path, None),
    };
    hosts(authority, &mut pairs)?;
    if let Some(path) = path {
        push_unless_empty(&mut pairs, "dbname", percent_decode("dbname", path)?);
    }
    if let Some(query) = query {
        let may_be_secret = credentials.is_none() && query.contains('@');
        parameters(query, may_be_secret, &mut pairs)?;
    }
    Ok(pairs)
}

fn push_unless_empty(pairs: &mut Pairs, keyword: &'static str, value: String) {
    if !value.is_empty() {
        pairs.push((keyword, value));
    }
}

/// `host1:port1,[::1]:port2,%2Fvar%2Frun` as the values of `host` and `port`.
fn hosts(authority: &str, pairs: &mut Pairs) -> Result<()> {
    if authority.is_empty() {
        return Ok(());
    }
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for one in authority.split(',') {
        let (name, port) = match one.strip_prefix('[') {
            Some(inner) => match inner.split_once(']') {
                Some((name, "")) => (name, ""),
                Some((name, port)) if port.starts_with(':') => (name, port.strip_prefix(':').unwrap_or_default()),
                Some(_) => return invalid("after the ] of an IPv6 address comes a port, another host or the database"),
                None => return invalid("the ] of an IPv6 address is missing"),
            },
            None => one.split_once(':').unwrap_or((one, "")),
        };
        names.push(percent_decode("host", name)?);
        ports.push(percent_decode("port", port)?);
    }
    if names.iter().any(|name| !name.is_empty()) {
        pairs.push(("host", names.join(",")));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        pairs.push(("port", ports.join(",")));
    }
    Ok(())
}

/// `keyword=value&…`; `secret` says that a piece of a password could be among them.
fn parameters(query: &str, mut secret: bool, pairs: &mut Pairs) -> Result<()> {
    for parameter in query.split('&').filter(|p| !p.is_empty()) {
        let Some((keyword, value)) = parameter.split_once('=') else {
            return invalid("a parameter after the ? of the URL has no \"=\"");
        };
        let keyword = percent_decode("a parameter's name", keyword)?;
        // JDBC's spelling, which libpq accepts too.
        if keyword == "ssl" && value == "true" {
            pairs.push(("sslmode", "require".to_owned()));
            continue;
        }
        let keyword = known(&keyword, secret)?;
        if value.contains('=') && keyword != "options" && keyword != "password" {
            return invalid(format!("the value of {keyword} has a second \"=\"; write it as %3D"));
        }
        secret |= keyword == "password";
        pairs.push((keyword, percent_decode(keyword, value)?));
    }
    Ok(())
}

/// `%40` to `@`. `what` names the place for the error.
fn percent_decode(what: &str, text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next()), digit(rest.next()));
        match high.zip(low).and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(0) => return invalid(format!("%00 is not allowed ({what})")),
            Some(byte) => bytes.push(byte),
            None => {
                return invalid(format!("after a % come two hexadecimal digits ({what}); write %25 for a % itself"));
            }
        }
    }
    String::from_utf8(bytes).or_else(|_| invalid(format!("percent-encoded text is not UTF-8 ({what})")))
}

/// Everything but letters, digits and `-._~` as `%XX`.
pub(super) fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            write!(encoded, "%{byte:02X}").unwrap_or_default();
        }
    }
    encoded
}

/// The URL of `conninfo` with `password` (already encoded) in its place.
pub(super) fn url(conninfo: &ConnInfo, password: Option<&str>) -> String {
    let mut url = format!("postgresql://{}", percent_encode(&conninfo.user));
    if let Some(password) = password {
        url.push(':');
        url.push_str(password);
    }
    url.push('@');
    let hosts: Vec<String> = conninfo
        .hosts
        .iter()
        .map(|host| match &host.address {
            Address::Tcp(name) if name.contains(':') => format!("[{}]:{}", percent_encode(name), host.port),
            Address::Tcp(name) => format!("{}:{}", percent_encode(name), host.port),
            Address::Unix(folder) => format!("{}:{}", percent_encode(&folder.to_string_lossy()), host.port),
        })
        .collect();
    url.push_str(&hosts.join(","));
    url.push('/');
    url.push_str(&percent_encode(&conninfo.database));
    let parameters: Vec<String> = fields::parameters(conninfo)
        .into_iter()
        .map(|(keyword, value)| format!("{keyword}={}", percent_encode(&value)))
        .collect();
    if !parameters.is_empty() {
        url.push('?');
        url.push_str(&parameters.join("&"));
    }
    url
}
