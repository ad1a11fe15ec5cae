//! Tables without a replica identity: how many updates and deletes the source had counted before each one's cut.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::{QualifiedName, quote_literal};

/// A table that was given another replica identity on the source, and the clause of ALTER TABLE that brings back the one
/// that it had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenIdentity {
    /// Schema and name that it had then.
    pub table: QualifiedName,
    /// Its `pg_class.oid` on the source, which stays when it is renamed; 0 where an older version wrote it down.
    pub oid: u32,
    /// Such as `REPLICA IDENTITY DEFAULT`.
    pub before: String,
}

impl Store {
    /// Writes down what a table's replica identity was, before it is changed; what is known already stays.
    ///
    /// # Errors
    /// The connection's.
    pub async fn remember_identity(&self, given: &GivenIdentity) -> Result<()> {
        let [name, schema, table, before] =
            [self.name.as_str(), &given.table.schema, &given.table.name, &given.before].map(quote_literal);
        self.execute(&format!(
            "INSERT INTO pgtandem.given_identity (move, source_oid, schema_name, table_name, before)
             SELECT {name}, {oid}, {schema}, {table}, {before}
             WHERE NOT EXISTS (SELECT FROM pgtandem.given_identity WHERE move = {name} AND source_oid = {oid})",
            oid = given.oid
        ))
        .await
        .doing(|| format!("remembering the replica identity of table {}", given.table.plain()))
    }

    /// The tables that were given another replica identity; none if the state is older than such things.
    ///
    /// # Errors
    /// The connection's.
    pub async fn given_identities(&self) -> Result<Vec<GivenIdentity>> {
        let session = self.session().await?;
        let client = session.get()?;
        let known: bool = client
            .query_one("SELECT pg_catalog.to_regclass('pgtandem.given_identity') IS NOT NULL", &[])
            .await
            .doing(|| "looking for the given replica identities")?
            .try_get(0)?;
        if !known {
            return Ok(Vec::new());
        }
        let rows = client
            .query(
                "SELECT schema_name, table_name, before,
                        COALESCE(pg_catalog.to_jsonb(given) ->> 'source_oid', '0')::oid
                 FROM pgtandem.given_identity given WHERE move = $1 ORDER BY 1, 2",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the given replica identities")?;
        rows.iter()
            .map(|row| {
                let table = QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? };
                Ok(GivenIdentity { table, oid: row.try_get(3)?, before: row.try_get(2)? })
            })
            .collect()
    }

    /// Writes the counts down, before a cut: a table that is copied already keeps the count from before its own.
    ///
    /// # Errors
    /// The connection's.
    pub async fn remember_unkeyed(&self, tables: &[(QualifiedName, i64)]) -> Result<()> {
        for chunk in tables.chunks(1000) {
            let values = self.values(chunk);
            self.execute(&format!(
                "INSERT INTO pgtandem.unkeyed_table AS known (move, schema_name, table_name, changes) VALUES {values}
                 ON CONFLICT (move, schema_name, table_name) DO UPDATE SET changes = excluded.changes
                 WHERE NOT EXISTS (
                     SELECT FROM pgtandem.copy_table t
                     WHERE t.move = known.move AND t.schema_name = known.schema_name
                       AND t.table_name = known.table_name AND t.state = 'copied')"
            ))
            .await
            .doing(|| "remembering the tables without a replica identity")?;
        }
        Ok(())
    }

    /// These have a replica identity by now: those of them that are yet to be copied are not watched any more.
    ///
    /// # Errors
    /// The connection's.
    pub async fn forget_unkeyed(&self, tables: &[QualifiedName]) -> Result<()> {
        for table in tables {
            let [name, schema, table] = [self.name.as_str(), &table.schema, &table.name].map(quote_literal);
            self.execute(&format!(
                "DELETE FROM pgtandem.unkeyed_table known
                 WHERE move = {name} AND schema_name = {schema} AND table_name = {table}
                   AND NOT EXISTS (
                     SELECT FROM pgtandem.copy_table t
                     WHERE t.move = known.move AND t.schema_name = known.schema_name
                       AND t.table_name = known.table_name AND t.state = 'copied')"
            ))
            .await
            .doing(|| "letting go of a table that has a replica identity by now")?;
        }
        Ok(())
    }

    /// What was written down.
    ///
    /// # Errors
    /// The connection's.
    pub async fn unkeyed(&self) -> Result<Vec<(QualifiedName, i64)>> {
        let session = self.session().await?;
        let rows = session
            .get()?
            .query(
                "SELECT schema_name, table_name, changes FROM pgtandem.unkeyed_table WHERE move = $1 ORDER BY 1, 2",
                &[&self.name.as_str()],
            )
            .await
            .doing(|| "reading the tables without a replica identity")?;
        rows.iter()
            .map(|row| Ok((QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }, row.try_get(2)?)))
            .collect()
    }

    /// From now on this count counts as the one from before the cut: both sides were found to agree, or the source's
    /// counter began anew.
    ///
    /// # Errors
    /// The connection's.
    pub async fn reset_unkeyed(&self, table: &QualifiedName, count: i64) -> Result<()> {
        self.execute(&format!(
            "UPDATE pgtandem.unkeyed_table SET changes = {count}
             WHERE move = {} AND schema_name = {} AND table_name = {}",
            quote_literal(self.name.as_str()),
            quote_literal(&table.schema),
            quote_literal(&table.name)
        ))
        .await
        .doing(|| format!("remembering the counter of table {}", table.plain()))
    }

    /// Takes every large object of the target over as the move's own: they are part of a copy made by hand.
    ///
    /// # Errors
    /// The connection's.
    pub async fn adopt_large_objects(&self) -> Result<()> {
        self.execute(&format!(
            "INSERT INTO pgtandem.large_object (move, loid)
             SELECT {}, oid FROM pg_catalog.pg_largeobject_metadata ON CONFLICT DO NOTHING",
            quote_literal(self.name.as_str())
        ))
        .await
        .doing(|| "taking over the large objects that were copied by hand")
    }

    /// Whether the move has made large objects on the target.
    ///
    /// # Errors
    /// The connection's.
    pub async fn has_large_objects(&self) -> Result<bool> {
        let session = self.session().await?;
        let row = session
            .get()?
            .query_one("SELECT EXISTS (SELECT FROM pgtandem.large_object WHERE move = $1)", &[&self.name.as_str()])
            .await
            .doing(|| "asking for the large objects of the move")?;
        Ok(row.try_get(0)?)
    }
}
