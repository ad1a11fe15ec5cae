//! Whether this machine has the client programs that move the schema.

use super::Finding;
use super::finding::kinds;
use super::look::Look;
use crate::error::Result;
use crate::postgres::Side;
use crate::schema::Programs;

kinds! {
    PROGRAMS_MISSING = Blocking "client_programs_missing" {
        what: "no pg_dump and pg_restore on this machine fit both servers",
        why: "they carry the schema: pg_dump must not be older than the source, and from 17 on pg_restore is only for targets of 17 and newer",
        fix: "install the client programs of the target's major version on the machine that runs pgtandem",
    }
    PROGRAMS = Info "client_programs" {
        what: "these client programs move the schema",
        why: "each major version writes a schema in its own way; the one nearest to the target's is taken",
        fix: "",
    }
}

/// Looks for them as `run` will.
pub(super) async fn find(look: &Look<'_>) -> Result<Vec<Finding>> {
    let major = |version: i32| u32::try_from(version).unwrap_or(0);
    let (source, target) = (&look.source.facts, &look.target.facts);
    Ok(vec![said(Programs::find(major(source.major()), major(target.major())).await)])
}

fn said(outcome: Result<Programs>) -> Finding {
    match outcome {
        Ok(programs) => {
            let what = format!("pg_dump and pg_restore {} of {} are used", programs.major, programs.folder.display());
            PROGRAMS.on(Side::Source, what)
        }
        Err(error) => {
            let finding = PROGRAMS_MISSING.on(Side::Source, error.to_string());
            match error.hint_text() {
                Some(hint) => finding.fix(hint),
                None => finding,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Error};

    #[test]
    fn the_pair_is_named_and_its_absence_blocks_with_the_package() {
        let found = said(Ok(Programs { major: 16, folder: "/opt/16/bin".into() }));
        assert_eq!(
            (found.code, found.what.as_str()),
            ("client_programs", "pg_dump and pg_restore 16 of /opt/16/bin are used")
        );
        let missing = said(Err(Error::new(Class::Operator, "client_programs_missing", "none").hint("install 18")));
        assert_eq!((missing.code, missing.fix.as_deref()), ("client_programs_missing", Some("install 18")));
    }
}
