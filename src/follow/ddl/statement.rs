//! Which statement of a text made a captured change. Pure.
//!
//! A client may send several statements in one text, and a function may run one of its own. The capture brings the text
//! that the client sent and the call stack, whose innermost frame quotes the statement that a function ran. Here the text is
//! cut at its semicolons, and the statement is chosen that has the tag of the change and names its object.

/// The statements of a text, in order, without comments before them; empty ones are left out.
pub(super) fn split(text: &str) -> Vec<&str> {
    let mut statements = Vec::new();
    let mut cursor = Cursor::new(text);
    let mut start = 0;
    let (mut parentheses, mut blocks) = (0_u32, 0_u32);
    let mut before = String::new();
    while let Some(token) = cursor.next() {
        match token {
            Token::Symbol('(') => parentheses += 1,
            Token::Symbol(')') => parentheses = parentheses.saturating_sub(1),
            Token::Symbol(';') if parentheses == 0 && blocks == 0 => {
                statements.push(&text[start..cursor.at - 1]);
                start = cursor.at;
            }
            Token::Word(word) if parentheses == 0 => {
                let is = |other: &str| word.eq_ignore_ascii_case(other);
                // The body of a routine in standard SQL holds statements, and CASE … END in them. Elsewhere these are
                // words like others, and so they are as the name of a column in a result.
                if blocks == 0 {
                    let opens = is("atomic") && before == "begin" && makes_a_routine(&text[start..cursor.at]);
                    blocks += u32::from(opens);
                } else if before != "as" && before != "." {
                    blocks += u32::from(is("case"));
                    blocks -= u32::from(is("end"));
                }
            }
            Token::Word(_) | Token::Quoted(_) | Token::Text | Token::Symbol(_) => {}
        }
        before = match token {
            Token::Word(word) => word.to_ascii_lowercase(),
            Token::Symbol(symbol) => symbol.to_string(),
            Token::Quoted(_) | Token::Text => String::new(),
        };
    }
    statements.push(&text[start..]);
    statements.into_iter().map(without_leading_comments).filter(|statement| !statement.is_empty()).collect()
}

/// Whether a statement that begins like this makes a function or a procedure.
fn makes_a_routine(beginning: &str) -> bool {
    let words = first_words(beginning, 4);
    let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !matches!(*word, "OR" | "REPLACE")).collect();
    matches!(words.as_slice(), ["CREATE", "FUNCTION" | "PROCEDURE", ..])
}

/// The same text for a server under `standard_conforming_strings = on`, of one that was written where it is off: there a backslash in
/// any string escapes what follows it.
pub(super) fn with_plain_backslashes(text: &str) -> String {
    let mut cursor = Cursor { text, at: 0, escapes: true };
    let mut changed = String::with_capacity(text.len());
    let mut copied = 0;
    loop {
        cursor.skip_blank();
        let start = cursor.at;
        if cursor.next().is_none() {
            break;
        }
        let token = &text[start..cursor.at];
        // A letter before it says what kind of string it is, E among them.
        let plain = token.starts_with('\'') && !text[..start].ends_with(|c: char| c.is_alphanumeric() || c == '&');
        if plain && token.contains('\\') {
            changed.push_str(&text[copied..start]);
            changed.push('E');
            copied = start;
        }
    }
    changed.push_str(&text[copied..]);
    changed
}

/// Whether the server may have left the statement undone and gone on: its object was, or was not, there.
pub(super) fn may_do_nothing(statement: &str) -> bool {
    first_words(statement, usize::MAX).windows(2).any(|words| {
        let [first, second] = words else { return false };
        first == "IF" && (second == "EXISTS" || second == "NOT")
    })
}

/// Whether a statement of this text is completed under this command tag, as far as its first words tell: `CREATE UNIQUE
/// INDEX …` is a `CREATE INDEX`.
pub(super) fn has_tag(statement: &str, tag: &str) -> bool {
    let words = first_words(statement, 8);
    let mut rest = words.iter();
    let mut tag = tag.split(' ');
    let first = tag.next().unwrap_or_default();
    rest.next().is_some_and(|word| word == first) && tag.all(|wanted| rest.any(|word| word == wanted))
}

/// The first words in capitals; names in quotes and symbols are passed over.
pub(super) fn first_words(statement: &str, count: usize) -> Vec<String> {
    let mut cursor = Cursor::new(statement);
    let mut words = Vec::new();
    while let Some(token) = cursor.next() {
        if words.len() == count {
            break;
        }
        if let Token::Word(word) = token {
            words.push(word.to_ascii_uppercase());
        }
    }
    words
}

/// Whether the statement mentions this name, quoted or not.
pub(super) fn mentions(statement: &str, name: &str) -> bool {
    let mut cursor = Cursor::new(statement);
    while let Some(token) = cursor.next() {
        let found = match token {
            Token::Word(word) => word.to_lowercase() == name,
            Token::Quoted(quoted) => quoted.replace("\"\"", "\"") == name,
            Token::Text | Token::Symbol(_) => false,
        };
        if found {
            return true;
        }
    }
    false
}

/// The statement without the word CONCURRENTLY: inside a transaction an index is built and dropped, and a
/// partition detached, without it.
pub(super) fn without_concurrently(statement: &str) -> String {
    let mut cursor = Cursor::new(statement);
    while let Some(token) = cursor.next() {
        if let Token::Word(word) = token
            && word.eq_ignore_ascii_case("concurrently")
        {
            let end = cursor.at;
            return format!("{}{}", &statement[..end - word.len()], &statement[end..]);
        }
    }
    statement.to_owned()
}

/// Whether a comma stands outside of all parentheses: several actions, or several objects.
pub(super) fn has_several_parts(statement: &str) -> bool {
    let mut cursor = Cursor::new(statement);
    let mut parentheses = 0_u32;
    while let Some(token) = cursor.next() {
        match token {
            Token::Symbol('(' | '[') => parentheses += 1,
            Token::Symbol(')' | ']') => parentheses = parentheses.saturating_sub(1),
            Token::Symbol(',') if parentheses == 0 => return true,
            _ => {}
        }
    }
    false
}

/// The statement that a function ran, from the call stack below the trigger's own frame; `None` at the top level.
///
/// # Errors
/// It came from a language that does not quote its statements.
pub(super) fn inner(context: &str) -> Result<Option<&str>, ()> {
    let Some((_, callers)) = context.split_once('\n') else { return Ok(None) };
    let quoted = callers.strip_prefix("SQL statement \"").ok_or(())?;
    let end = quoted.find("\"\nPL/pgSQL function ").or_else(|| quoted.strip_suffix('"').map(str::len)).ok_or(())?;
    Ok(Some(&quoted[..end]))
}

fn without_leading_comments(statement: &str) -> &str {
    let mut cursor = Cursor::new(statement);
    cursor.skip_blank();
    statement[cursor.at..].trim_end()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'t> {
    Word(&'t str),
    /// Without the quotes around it.
    Quoted(&'t str),
    /// A string, in any of its forms.
    Text,
    Symbol(char),
}

/// Reads SQL as the server's scanner does, as far as it matters where a statement ends.
struct Cursor<'t> {
    text: &'t str,
    at: usize,
    /// Whether backslashes escape in every string.
    escapes: bool,
}

impl<'t> Cursor<'t> {
    fn new(text: &'t str) -> Self {
        Self { text, at: 0, escapes: false }
    }

    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn next(&mut self) -> Option<Token<'t>> {
        self.skip_blank();
        let rest = self.rest();
        let first = rest.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
        Some(match first {
            '\'' => {
                self.at += quoted(rest, '\'', self.escapes);
                Token::Text
            }
            '"' => {
                let length = quoted(rest, '"', false);
                self.at += length;
                Token::Quoted(rest.get(1..length.saturating_sub(1).max(1)).unwrap_or_default())
            }
            'e' | 'E' if rest[1..].starts_with('\'') => {
                self.at += 1 + quoted(&rest[1..], '\'', true);
                Token::Text
            }
            '$' => match dollar_tag(rest) {
                Some(tag) => {
                    let body = &rest[tag.len()..];
                    self.at += body.find(tag).map_or(rest.len(), |end| end + 2 * tag.len());
                    Token::Text
                }
                None => self.symbol(first),
            },
            c if is_word(c) => {
                let length = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
                self.at += length;
                Token::Word(&rest[..length])
            }
            other => self.symbol(other),
        })
    }

    fn symbol(&mut self, symbol: char) -> Token<'t> {
        self.at += symbol.len_utf8();
        Token::Symbol(symbol)
    }

    /// White space and comments; those of the second kind may hold each other.
    fn skip_blank(&mut self) {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
            self.at += rest.len() - trimmed.len();
            if trimmed.starts_with("--") {
                self.at += trimmed.find(['\n', '\r']).unwrap_or(trimmed.len());
            } else if trimmed.starts_with("/*") {
                self.at += comment(trimmed);
            } else {
                return;
            }
        }
    }
}

/// The length of a quoted text, both quotes included; to the end if the last one is missing.
fn quoted(text: &str, quote: char, backslashes: bool) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if backslashes && c == '\\' {
            characters.next();
        } else if c == quote {
            match characters.peek() {
                Some((_, next)) if *next == quote => drop(characters.next()),
                _ => return at + 1,
            }
        }
    }
    text.len()
}

/// `$tag$` at the beginning of the text.
fn dollar_tag(text: &str) -> Option<&str> {
    let end = text[1..].find('$')? + 2;
    let tag = &text[1..end - 1];
    let fits = tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii())
        && !tag.starts_with(|c: char| c.is_ascii_digit());
    fits.then(|| &text[..end])
}

fn comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_u32, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes.get(at..at + 2) {
            Some(b"/*") => {
                depth += 1;
                at += 2;
            }
            Some(b"*/") => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_text_is_cut_at_its_semicolons_and_only_there() {
        let text = "create table a (v text default 'x;y''z'); -- one; comment\n/* a /* nested; */ one; */ insert into a values (E'\\';');
            create function f() returns text language plpgsql as $b$ begin return ';'; end $b$;
            create function g() returns int begin atomic select 1; select case when true then 2 else 3 end; end;
            create rule r as on insert to a do (select 1; select 2);; create index \"odd;name\" on a (v)";
        let found = split(text);
        let begins: Vec<_> = found.iter().map(|s| first_words(s, 3).join(" ")).collect();
        assert_eq!(begins[..2], ["CREATE TABLE A", "INSERT INTO A"]);
        assert_eq!(begins[2..], ["CREATE FUNCTION F", "CREATE FUNCTION G", "CREATE RULE R", "CREATE INDEX ON"]);
    }

    #[test]
    fn only_the_body_of_a_routine_holds_statements() {
        assert_eq!(split("create view v as select 1 as begin, atomic from t; drop table u").len(), 2);
        assert_eq!(split("select begin atomic from t; select 2; drop table u; select end from t").len(), 4);
        assert_eq!(split("create rule r as on insert to a do (select begin atomic from t); drop table u").len(), 2);
        let body = "create or replace procedure p() begin atomic select 1 as end; select case when true then t.case end from t; end";
        assert_eq!(split(&format!("{body}; drop table u")), [body, "drop table u"]);
        let parameter = "create function f(begin atomic default null) returns int language sql as 'select 1'";
        assert_eq!(split(&format!("{parameter}; drop table u")), [parameter, "drop table u"]);
    }

    #[test]
    fn a_text_whose_strings_have_escapes_means_the_same_where_they_have_none() {
        let text = r"create table a (v text default 'it\'s; one', w text default E'\t', x text default 'plain''s')";
        let meant = r"create table a (v text default E'it\'s; one', w text default E'\t', x text default 'plain''s')";
        assert_eq!(with_plain_backslashes(text), meant);
        assert_eq!(split(meant).len(), 1);
        let others = r#"comment on table "a\'b" is $$it's \$$ -- it's \"#;
        assert_eq!(with_plain_backslashes(others), others);
    }

    #[test]
    fn a_statement_may_have_nothing_to_do() {
        assert!(may_do_nothing("alter table t drop constraint if exists c"));
        assert!(may_do_nothing("create index if not exists i on t (a)"));
        assert!(!may_do_nothing("comment on table t is 'if exists'"));
    }

    #[test]
    fn a_statement_is_known_by_its_first_words() {
        assert!(has_tag("create unique index concurrently if not exists i on t (a)", "CREATE INDEX"));
        assert!(has_tag("CREATE OR REPLACE FUNCTION f() …", "CREATE FUNCTION"));
        assert!(has_tag("create unlogged table t ()", "CREATE TABLE"));
        assert!(!has_tag("create view v as select", "CREATE TABLE"));
        assert!(!has_tag("insert into create_table values (1)", "CREATE TABLE"));
    }

    #[test]
    fn names_are_found_quoted_or_not() {
        assert!(mentions("alter table public.Orders add x int", "orders"));
        assert!(mentions(r#"alter table "Or""ders" add x int"#, "Or\"ders"));
        assert!(!mentions("comment on table t is 'orders'", "orders"));
    }

    #[test]
    fn several_actions_are_told_from_one() {
        assert!(has_several_parts("alter table t drop constraint c, owner to bob"));
        assert!(has_several_parts("drop view a, b"));
        assert!(!has_several_parts("alter table t add x numeric(10, 2) default f('a, b', 1)"));
    }

    #[test]
    fn the_word_concurrently_goes_and_nothing_else() {
        assert_eq!(without_concurrently("drop index concurrently if exists i"), "drop index  if exists i");
        assert_eq!(
            without_concurrently("comment on table t is 'concurrently'"),
            "comment on table t is 'concurrently'"
        );
    }

    #[test]
    fn the_innermost_statement_is_the_one_below_the_trigger() {
        let own = "PL/pgSQL function pgtandem.capture_app() line 20 at GET DIAGNOSTICS";
        assert_eq!(inner(own), Ok(None));
        let nested =
            format!("{own}\nSQL statement \"create table \"t\" (a\n int)\"\nPL/pgSQL function f() line 3 at EXECUTE");
        assert_eq!(inner(&nested), Ok(Some("create table \"t\" (a\n int)")));
        assert_eq!(inner(&format!("{own}\nSQL function \"f\" statement 1")), Err(()));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text: String) {
            for statement in split(&text) {
                prop_assert!(text.contains(statement));
                drop((first_words(statement, 5), mentions(statement, "x"), without_concurrently(statement)));
            }
            drop(with_plain_backslashes(&text));
            prop_assert!(inner(&text).is_ok_and(|found| found.is_none()) || text.contains('\n'));
        }

        #[test]
        fn sql_like_text_is_read_without_a_panic(text in "[-a-zE$;'\"\\\\(){}/* \n]{0,60}") {
            for statement in split(&text) {
                prop_assert!(text.contains(statement));
                drop((first_words(statement, 5), mentions(statement, "x"), without_concurrently(statement)));
            }
            drop(with_plain_backslashes(&text));
        }
    }
}
