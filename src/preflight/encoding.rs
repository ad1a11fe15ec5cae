//! Whether text means the same on both sides: encoding, locale, and the collations that columns ask for.

use super::Finding;
use super::finding::kinds;
use super::look::{Facts, Look, Place};
use super::privileges::text;
use crate::error::Result;
use crate::postgres::catalog::IS_USER_TABLE;
use crate::postgres::{Side, quote_identifier, quote_literal};

/// The provider came in 15, the name of its locale column changed in 17, so the row is read as a document.
const LOCALE: &str = r"
    SELECT pg_catalog.pg_encoding_to_char(d.encoding)::text, d.datcollate::text, d.datctype::text,
           COALESCE(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c'),
           COALESCE(pg_catalog.to_jsonb(d) ->> 'datlocale', pg_catalog.to_jsonb(d) ->> 'daticulocale'),
           pg_catalog.to_jsonb(d) ->> 'datcollversion'
    FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()";

/// Collations that columns name, other than the database's own; user-made ones are restored with the schema.
fn named_collations() -> String {
    format!(
        r"
        SELECT DISTINCT cn.nspname::text, co.collname::text
        FROM pg_catalog.pg_attribute a
        JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
        JOIN pg_catalog.pg_namespace cn ON cn.oid = co.collnamespace
        WHERE a.attnum > 0 AND NOT a.attisdropped AND cn.nspname = 'pg_catalog'
          AND co.collname NOT IN ('default', 'C', 'POSIX')
          AND c.relkind IN ('r', 'p', 'm', 'v') AND {IS_USER_TABLE}
        ORDER BY 1, 2"
    )
}

const COLLATIONS_THERE: &str = r"
    SELECT co.collname::text FROM pg_catalog.pg_collation co
    JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
    WHERE co.collnamespace = 'pg_catalog'::pg_catalog.regnamespace
      AND co.collencoding IN (-1, d.encoding) AND co.collname = ANY ($1)";

kinds! {
    ENCODING_DIFFERS = Blocking "encoding_differs" {
        what: "the databases have different encodings",
        why: "text would be converted on its way, and what has no counterpart is refused in the middle of the move",
        fix: "make the target database anew: CREATE DATABASE … ENCODING … TEMPLATE template0",
    }
    SQL_ASCII = Warning "sql_ascii" {
        what: "the databases are SQL_ASCII",
        why: "the server does not know what its bytes mean; the connections of the move are UTF-8, and the target refuses bytes that are not, in the middle of the copy",
        fix: "be sure that all text is UTF-8, ASCII being part of it",
    }
    LOCALE_DIFFERS = Warning "locale_differs" {
        what: "the databases sort or classify text differently",
        why: "ORDER BY, upper() and unique indexes over text may behave otherwise after the cutover; indexes are built anew, so none is corrupt",
        fix: "make the target database anew with the source's locale, if the order matters",
    }
    COLLATION_VERSION = Info "collation_version_differs" {
        what: "the databases' collation libraries have different versions",
        why: "some texts may sort otherwise after the cutover; indexes are built anew, so none is corrupt",
        fix: "",
    }
    COLLATION_MISSING = Blocking "collation_missing" {
        what: "the target lacks a collation that a column names",
        why: "the column cannot be restored",
        fix: "install the locale on the target's machine, then SELECT pg_import_system_collations('pg_catalog')",
    }
}

/// How a database treats text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Locale {
    encoding: String,
    collate: String,
    ctype: String,
    provider: String,
    locale: Option<String>,
    version: Option<String>,
}

impl Locale {
    async fn of(place: &Place<'_>) -> Result<Self> {
        let row = place.client.query_one(LOCALE, &[]).await?;
        Ok(Self {
            encoding: text(&row, 0)?,
            collate: text(&row, 1)?,
            ctype: text(&row, 2)?,
            provider: text(&row, 3)?,
            locale: row.try_get(4)?,
            version: row.try_get(5)?,
        })
    }

    /// For people: `libc en_US.UTF-8`.
    fn describe(&self) -> String {
        let provider = match self.provider.as_str() {
            "c" => "libc",
            "i" => "icu",
            "b" => "builtin",
            other => other,
        };
        let name = self.locale.as_deref().filter(|_| self.provider != "c").unwrap_or(&self.collate);
        if self.ctype == self.collate {
            format!("{provider} {name}")
        } else {
            format!("{provider} {name}, ctype {}", self.ctype)
        }
    }

    /// Whether both sort alike by name: spellings of one libc locale (`en_US.utf8`, `en_US.UTF-8`) are equal.
    fn sorts_like(&self, other: &Self) -> bool {
        let plain = |name: &str| name.to_ascii_lowercase().replace('-', "");
        let libc = self.provider != "c"
            || (plain(&self.collate) == plain(&other.collate) && plain(&self.ctype) == plain(&other.ctype));
        self.provider == other.provider && libc && (self.provider == "c" || self.locale == other.locale)
    }
}

pub(super) async fn database_locale(look: &Look<'_>) -> Result<Vec<Finding>> {
    let source = Locale::of(&look.source).await?;
    let target = Locale::of(&look.target).await?;
    Ok(compare(&source, &target, &look.target.facts))
}

fn compare(source: &Locale, target: &Locale, facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    if source.encoding != target.encoding {
        let what = format!("the source is {}, the target {}", source.encoding, target.encoding);
        found.push(ENCODING_DIFFERS.on(Side::Target, what).fix(create_like(source, facts)));
    } else if source.encoding == "SQL_ASCII" {
        found.push(SQL_ASCII.on(Side::Source, "both databases are SQL_ASCII"));
    }
    if !source.sorts_like(target) {
        let what = format!("the source sorts by {}, the target by {}", source.describe(), target.describe());
        found.push(LOCALE_DIFFERS.on(Side::Target, what).fix(create_like(source, facts)));
    } else if let (Some(ours), Some(theirs)) = (&source.version, &target.version)
        && ours != theirs
    {
        let what = format!("{} is version {ours} on the source, {theirs} on the target", source.describe());
        found.push(COLLATION_VERSION.on(Side::Target, what));
    }
    found
}

/// Without a provider, the new database would take that of its template.
fn create_like(source: &Locale, target: &Facts) -> String {
    let provider = match (source.provider.as_str(), &source.locale) {
        ("i", Some(locale)) => format!(" LOCALE_PROVIDER icu ICU_LOCALE {}", quote_literal(locale)),
        ("b", Some(locale)) => format!(" LOCALE_PROVIDER builtin BUILTIN_LOCALE {}", quote_literal(locale)),
        _ if target.major() >= 15 => " LOCALE_PROVIDER libc".to_owned(),
        _ => String::new(),
    };
    format!(
        "DROP DATABASE {database};\nCREATE DATABASE {database} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}{provider};",
        quote_literal(&source.encoding),
        quote_literal(&source.collate),
        quote_literal(&source.ctype),
        database = quote_identifier(&target.database),
    )
}

/// Collations of the system's catalog that are not on the other machine.
pub(super) async fn column_collations(look: &Look<'_>) -> Result<Vec<Finding>> {
    let rows = look.source.client.query(&named_collations(), &[]).await?;
    let named = rows.iter().map(|row| text(row, 1)).collect::<Result<Vec<_>>>()?;
    let rows = look.target.client.query(COLLATIONS_THERE, &[&named]).await?;
    let there = rows.iter().map(|row| text(row, 0)).collect::<Result<Vec<_>>>()?;
    let missing: Vec<_> = named.into_iter().filter(|name| !there.contains(name)).collect();
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("columns name collations that the target lacks: {}", missing.join(", "));
    Ok(vec![COLLATION_MISSING.on(Side::Target, what).objects(missing)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libc(encoding: &str, collate: &str, version: &str) -> Locale {
        Locale {
            encoding: encoding.into(),
            collate: collate.into(),
            ctype: collate.into(),
            provider: "c".into(),
            locale: None,
            version: Some(version.into()),
        }
    }

    fn on(major: i32) -> Facts {
        Facts {
            version_num: major * 10_000,
            version: String::new(),
            user: "app".into(),
            in_recovery: false,
            database: "app".into(),
            superuser: false,
        }
    }

    #[test]
    fn a_new_database_names_its_provider_where_a_server_has_several() {
        let statement = |major| create_like(&libc("UTF8", "C", "1"), &on(major));
        assert!(statement(15).ends_with("LC_CTYPE 'C' LOCALE_PROVIDER libc;"), "{}", statement(15));
        assert!(statement(14).ends_with("LC_CTYPE 'C';"), "{}", statement(14));
    }

    fn codes(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn another_encoding_blocks_with_a_statement_that_makes_the_same() {
        let found = compare(&libc("LATIN1", "C", "1"), &libc("UTF8", "C", "1"), &on(15));
        assert_eq!(codes(&found), ["encoding_differs"]);
        let fix = found[0].fix.as_deref().unwrap_or_default();
        assert!(fix.contains("CREATE DATABASE \"app\" TEMPLATE template0 ENCODING 'LATIN1'"), "{fix}");
    }

    #[test]
    fn spellings_of_one_locale_are_equal_and_versions_are_only_mentioned() {
        let found = compare(&libc("UTF8", "en_US.UTF-8", "2.31"), &libc("UTF8", "en_US.utf8", "2.36"), &on(15));
        assert_eq!(codes(&found), ["collation_version_differs"]);
    }

    #[test]
    fn another_locale_or_provider_is_a_warning() {
        let icu = Locale { provider: "i".into(), locale: Some("en".into()), ..libc("UTF8", "C", "1") };
        assert_eq!(codes(&compare(&libc("UTF8", "C", "1"), &icu, &on(15))), ["locale_differs"]);
        assert_eq!(
            codes(&compare(&libc("UTF8", "C", "1"), &libc("UTF8", "de_DE.UTF-8", "1"), &on(15))),
            ["locale_differs"]
        );
    }
}
