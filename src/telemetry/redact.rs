//! The last door before text is shown: takes passwords out of connection strings that slipped into a message.
//!
//! Errors are redacted where they arise; this is the second line, because a status page is read by many.

const MASK: &str = "***";

/// `text` without the password of any URL or `password=` pair, and without control characters, which could drive
/// the terminal of whoever reads it.
#[must_use]
pub fn shown(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    without_pairs(&without_user_info(&plain))
}

/// `scheme://user:secret@host` becomes `scheme://user:***@host`.
fn without_user_info(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        shown.push_str(before);
        // The last @ before the path: a password may hold an unescaped one.
        let end = after.find(|c: char| c.is_whitespace() || matches!(c, '/' | '?' | '"' | '\'')).unwrap_or(after.len());
        let (authority, tail) = after.split_at(end);
        match authority.rsplit_once('@') {
            Some((user, host)) => {
                let name = user.split_once(':').map_or(user, |(name, _)| name);
                shown.push_str(name);
                if name.len() < user.len() {
                    shown.push(':');
                    shown.push_str(MASK);
                }
                shown.push('@');
                shown.push_str(host);
            }
            None => shown.push_str(authority),
        }
        rest = tail;
    }
    shown.push_str(rest);
    shown
}

/// `password=secret`, also quoted and also `sslpassword=`, becomes `password=***`.
fn without_pairs(text: &str) -> String {
    const KEY: &str = "password=";
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.to_ascii_lowercase().find(KEY) {
        let (before, value) = rest.split_at(at + KEY.len());
        shown.push_str(before);
        shown.push_str(MASK);
        rest = value.split_at(value_length(value)).1;
    }
    shown.push_str(rest);
    shown
}

/// How many bytes of `text` are the value of a pair.
fn value_length(text: &str) -> usize {
    if !text.starts_with('\'') {
        return text.find(|c: char| c.is_whitespace() || matches!(c, '&' | '"' | ';')).unwrap_or(text.len());
    }
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '\'' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn passwords_of_both_forms_are_masked() {
        for (text, expected) in [
            ("to postgresql://app:s3cr3t@db:5432/x?a=b: no", "to postgresql://app:***@db:5432/x?a=b: no"),
            ("postgres://app:a@b@db/x", "postgres://app:***@db/x"),
            ("postgres://app@db/x", "postgres://app@db/x"),
            ("host=db password=s3cr3t user=app", "host=db password=*** user=app"),
            (r"host=db Password='it\'s s3cr3t' user=app", "host=db Password=*** user=app"),
            ("postgres://db/x?password=s3cr3t&user=app", "postgres://db/x?password=***&user=app"),
            ("no secret \u{1b}[31mhere", "no secret  [31mhere"),
        ] {
            assert_eq!(shown(text), expected);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_shown_without_a_control_character(text: String) {
            prop_assert!(!shown(&text).chars().any(char::is_control));
        }

        #[test]
        fn no_password_survives(password in "[A-Z0-9!@:#$%^*]{4,20}") {
            let with = |secret: &str| {
                format!("cannot reach postgresql://app:{secret}@db.example:5432/app or password={secret}")
            };
            prop_assert_eq!(shown(&with(&password)), with(MASK));
        }
    }
}
