//! Objects that the target would refuse when the schema is restored, though the source has them.

use super::Finding;
use super::finding::kinds;
use super::look::{Attempt, Look};
use super::privileges::text;
use crate::config::CopyMethod;
use crate::error::Result;
use crate::postgres::{QualifiedName, Side, quote_literal};

/// Functions in C beside those of the server itself and of extensions: library, symbols, and how DROP FUNCTION names them.
const IN_LIBRARIES: &str = r"
    SELECT p.probin,
           pg_catalog.array_agg(DISTINCT p.prosrc),
           pg_catalog.array_agg(p.oid::pg_catalog.regprocedure::text ORDER BY p.oid::pg_catalog.regprocedure::text)
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
    WHERE l.lanname = 'c' AND p.oid >= 16384
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                      WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND d.objid = p.oid AND d.deptype = 'e')
    GROUP BY p.probin ORDER BY p.probin";

/// Generated columns that are ordinary ones in the table that theirs inherits from: child, parent, column.
const GENERATED_IN_CHILD: &str = r"
    SELECT cn.nspname::text, c.relname::text, pn.nspname::text, p.relname::text, a.attname::text
    FROM pg_catalog.pg_inherits i
    JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid JOIN pg_catalog.pg_namespace cn ON cn.oid = c.relnamespace
    JOIN pg_catalog.pg_class p ON p.oid = i.inhparent JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attgenerated <> '' AND NOT a.attisdropped
    JOIN pg_catalog.pg_attribute b ON b.attrelid = p.oid AND b.attname = a.attname
                                  AND b.attgenerated = '' AND NOT b.attisdropped
    ORDER BY 1, 2, 3, 4, 5";

/// The first version that refuses them.
const GENERATED_AS_THE_PARENT: i32 = 16;

kinds! {
    LIBRARY_REFUSED = Blocking "library_refused" {
        what: "the target does not take functions in C that the source has",
        why: "it lacks their library, has it for another version, or allows them to superusers alone: the restore would stop at the first of them",
        fix: "install the library for the target's version at the same place, or on the source: DROP FUNCTION …",
    }
    GENERATED_IN_CHILD_REFUSED = Blocking "generated_in_child" {
        what: "a column is generated, but not in the table that its table inherits from",
        why: "from PostgreSQL 16 on both are, or neither: the restore would stop at the table",
        fix: "on the source: ALTER TABLE … NO INHERIT …",
    }
}

/// Whether the target can load the libraries of the source's functions, by making such functions for a moment.
pub(super) async fn libraries(look: &Look<'_>) -> Result<Vec<Finding>> {
    if look.begun || look.config.copy.method == CopyMethod::None {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for row in look.source.client.query(IN_LIBRARIES, &[]).await? {
        let library = text(&row, 0)?;
        let words = match look.target.attempt(&probe(&library, &row.try_get::<_, Vec<String>>(1)?)).await {
            Ok(Attempt::Allowed) => continue,
            Ok(Attempt::Refused(words)) => words,
            Err(error) if error.sqlstate().is_some() => error.to_string(),
            Err(error) => return Err(error),
        };
        let functions: Vec<String> = row.try_get(2)?;
        // In one statement: one of them may go with a type that another one needs.
        let fix = format!(
            "install {library} on the target, built for its version, or on the source:\nDROP FUNCTION {} CASCADE;",
            functions.join(", ")
        );
        let what = format!("{} functions in C of the library {library}: {words}", functions.len());
        found.push(LIBRARY_REFUSED.on(Side::Target, what).fix(fix).objects(functions));
    }
    Ok(found)
}

/// The server looks for the library and each symbol when a function is made; what arguments it takes, it does not ask.
fn probe(library: &str, symbols: &[String]) -> String {
    let make = |(number, symbol): (usize, &String)| {
        format!(
            "CREATE FUNCTION pg_temp.pgtandem_probe_{number}() RETURNS pg_catalog.void LANGUAGE c AS {}, {};",
            quote_literal(library),
            quote_literal(symbol)
        )
    };
    symbols.iter().enumerate().map(make).collect()
}

pub(super) async fn generated_in_children(look: &Look<'_>) -> Result<Vec<Finding>> {
    let refuses = look.target.facts.major() >= GENERATED_AS_THE_PARENT;
    if !refuses || look.begun || look.config.copy.method == CopyMethod::None {
        return Ok(Vec::new());
    }
    let (mut fix, mut objects) = (Vec::new(), Vec::new());
    for row in look.source.client.query(GENERATED_IN_CHILD, &[]).await? {
        let child = QualifiedName::new(text(&row, 0)?, text(&row, 1)?);
        let parent = QualifiedName::new(text(&row, 2)?, text(&row, 3)?);
        objects.push(format!("{}.{}", child.plain(), text(&row, 4)?));
        fix.push(format!("ALTER TABLE {child} NO INHERIT {parent};"));
    }
    fix.dedup();
    if objects.is_empty() {
        return Ok(Vec::new());
    }
    let what = format!("{} generated columns are not generated in the parent of their table", objects.len());
    Ok(vec![GENERATED_IN_CHILD_REFUSED.on(Side::Source, what).fix(fix.join("\n")).objects(objects)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_symbols_are_quoted() {
        let sql = probe("/o'neill/lib", &["a".to_owned(), "b\\".to_owned()]);
        assert!(sql.contains("probe_0() RETURNS pg_catalog.void LANGUAGE c AS '/o''neill/lib', 'a';"), "{sql}");
        assert!(sql.contains(r"probe_1() RETURNS pg_catalog.void LANGUAGE c AS '/o''neill/lib',  E'b\\';"), "{sql}");
    }
}
