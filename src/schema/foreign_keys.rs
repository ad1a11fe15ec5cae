//! Foreign keys where the target's role may not set `session_replication_role`.
//!
//! There, an enforced foreign key would fire for every row that following applies, and refuse states between two rows of
//! one transaction. So they are added when the last row is in, inside the write pause, as NOT VALID: that is quick, and
//! it holds for every new row. The old rows are checked after the switch, beside the application.
//! A partitioned table takes no NOT VALID foreign key before version 18; its keys are checked at once.

use std::collections::HashSet;

use crate::error::{Doing, Error, Result};
use crate::postgres::{QualifiedName, Server, Session, quote_identifier, quote_literal};
use crate::state::{HeldBack, Store};

/// The foreign keys of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignKeys(Vec<ForeignKey>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct ForeignKey {
    table: QualifiedName,
    name: String,
    /// `FOREIGN KEY (…) REFERENCES …`, every name qualified.
    definition: String,
    validated: bool,
    partitioned: bool,
    comment: Option<String>,
}

const READ: &str = r"
    SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass::oid, k.oid, n.nspname, c.relname, k.conname::text,
           pg_catalog.pg_get_constraintdef(k.oid), k.convalidated, c.relkind = 'p',
           pg_catalog.obj_description(k.oid, 'pg_constraint')
    FROM pg_catalog.pg_constraint k
    JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE k.contype = 'f' AND k.conparentid = 0 AND ";

impl ForeignKeys {
    /// Reads them from the source; `left_out` names constraints that do not travel.
    ///
    /// # Errors
    /// The connection's.
    pub async fn read(source: &Session, left_out: &HashSet<(u32, u32)>) -> Result<Self> {
        let sql = format!("{READ} {} ORDER BY 3, 4, 5", crate::postgres::catalog::IS_USER_TABLE);
        let rows = source.query(&sql, &[]).await.doing(|| "reading the foreign keys")?;
        let mut keys = Vec::new();
        for row in &rows {
            if left_out.contains(&(row.try_get(0)?, row.try_get(1)?)) {
                continue;
            }
            keys.push(ForeignKey {
                table: QualifiedName { schema: row.try_get(2)?, name: row.try_get(3)? },
                name: row.try_get(4)?,
                definition: row.try_get(5)?,
                validated: row.try_get(6)?,
                partitioned: row.try_get(7)?,
                comment: row.try_get(8)?,
            });
        }
        Ok(Self(keys))
    }

    /// Reads all of them, to see whether they change.
    ///
    /// # Errors
    /// The connection's.
    pub async fn all(source: &Session) -> Result<Self> {
        Self::read(source, &HashSet::new()).await
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As objects that are held back until the cutover: adding is quick, and undone if the cutover is given up.
    ///
    /// # Errors
    /// The connection's.
    pub async fn held_back(&self, target: &Session) -> Result<Vec<HeldBack>> {
        let version = server_version(target).await?;
        Ok(self.0.iter().map(|key| key.held_back(version)).collect())
    }

    /// Checks the old rows of those that were added unchecked, one after the other; can be repeated. The event triggers
    /// that came from the source do not see our statement, and see everything that others do meanwhile. What cannot be
    /// checked stays as it is, with a line in the log: the application is on the target by now.
    pub async fn validate(&self, target: &Server, store: &Store) {
        let unchecked = async {
            let session = target.connect("foreign keys").await?;
            let present = present(&session).await?;
            Ok((session, present))
        };
        let (session, present) = match unchecked.await {
            Ok(found) => found,
            Err(error) => return warn(&error),
        };
        let [disable, enable] = store.around_event_triggers();
        for key in self.0.iter().filter(|key| key.validated && present.get(&key.id()) == Some(&false)) {
            let statement = format!("ALTER TABLE {} VALIDATE CONSTRAINT {}", key.table, quote_identifier(&key.name));
            let validated = session
                .batch_execute(&format!("BEGIN; {disable}; {statement}; {enable}; COMMIT"))
                .await
                .doing(|| format!("validating the foreign key {} of {}", key.name, key.table.plain()));
            if let Err(error) = validated {
                warn(&error.hint(statement));
                if let Err(error) = session.batch_execute("ROLLBACK").await {
                    return warn(&error.into());
                }
            }
        }
    }
}

fn warn(error: &Error) {
    tracing::warn!(
        code = error.code(),
        hint = error.hint_text(),
        "a foreign key holds for new rows, and its old ones were not checked: {error}"
    );
}

type Id = (String, String, String);

impl ForeignKey {
    fn id(&self) -> Id {
        (self.table.schema.clone(), self.table.name.clone(), self.name.clone())
    }

    fn held_back(&self, server_version: i32) -> HeldBack {
        let name = quote_identifier(&self.name);
        let needs_check = self.partitioned && server_version < 180_000;
        let already = ["NOT VALID", "NOT ENFORCED"].iter().any(|end| self.definition.ends_with(end));
        let suffix = if needs_check || already { "" } else { " NOT VALID" };
        let only = if self.partitioned { "" } else { "ONLY " };
        let drop = format!("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {name}", self.table);
        let add = format!("ALTER TABLE {only}{} ADD CONSTRAINT {name} {}{suffix}", self.table, self.definition);
        let comment = self
            .comment
            .as_ref()
            .map(|comment| format!("; COMMENT ON CONSTRAINT {name} ON {} IS {}", self.table, quote_literal(comment)));
        HeldBack {
            what: format!("foreign key {} of {}", self.name, self.table.plain()),
            // Dropped first, so that it can be repeated.
            enable: format!("{drop}; {add}{}", comment.unwrap_or_default()),
            disable: drop,
        }
    }
}

/// The foreign keys of the target, and whether each is validated.
async fn present(session: &Session) -> Result<std::collections::HashMap<Id, bool>> {
    let rows = session
        .query(
            "SELECT n.nspname, c.relname, k.conname::text, k.convalidated FROM pg_catalog.pg_constraint k
             JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE k.contype = 'f'",
            &[],
        )
        .await
        .doing(|| "listing the target's foreign keys")?;
    rows.iter().map(|row| Ok(((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?), row.try_get(3)?))).collect()
}

async fn server_version(session: &Session) -> Result<i32> {
    let row = session.query_one("SELECT pg_catalog.current_setting('server_version_num')::int4", &[]).await?;
    Ok(row.try_get(0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(definition: &str, partitioned: bool) -> ForeignKey {
        ForeignKey {
            table: QualifiedName::new("s", "t"),
            name: "k".into(),
            definition: definition.into(),
            validated: true,
            partitioned,
            comment: None,
        }
    }

    #[test]
    fn a_key_is_added_unchecked_where_the_server_can() {
        let plain = "FOREIGN KEY (a) REFERENCES s.u(a)";
        let sql = |definition, partitioned, version| key(definition, partitioned).held_back(version).enable;
        assert!(sql(plain, false, 150_000).ends_with("s.u(a) NOT VALID"));
        assert!(sql(plain, true, 170_000).ends_with("s.u(a)"));
        assert!(sql(plain, true, 180_000).ends_with("NOT VALID"));
        assert_eq!(sql("FOREIGN KEY (a) REFERENCES s.u(a) NOT VALID", false, 150_000).matches("NOT VALID").count(), 1);
    }
}
