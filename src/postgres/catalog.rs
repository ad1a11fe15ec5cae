//! What several rooms ask a server's catalog: its tables with columns, keys and sizes, and its sequences.
//!
//! Questions of one room only stay in that room.

use std::collections::HashMap;

use crate::config::Scope;
use crate::error::{Doing, Error, Result};
use crate::postgres::lsn::InvalidLsn;
use crate::postgres::{Lsn, QualifiedName};

/// What identifies an old row in the stream, `pg_class.relreplident` resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// The primary key or the chosen index: names of its columns, in index order.
    Key(Vec<String>),
    /// The whole old row.
    Full,
    /// Nothing: updates and deletes cannot be carried.
    Nothing,
}

/// A column that holds data of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// As the catalog holds it.
    pub name: String,
    /// `format_type`, qualified.
    pub type_name: String,
    /// GENERATED ALWAYS AS (…): computed by each side, never written by us.
    pub generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: written with OVERRIDING SYSTEM VALUE.
    pub identity_always: bool,
}

/// A user table that stores rows: ordinary tables and leaf partitions, permanent only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `pg_class.oid`
    pub oid: u32,
    /// Schema and name.
    pub name: QualifiedName,
    /// In order; dropped columns are left out.
    pub columns: Vec<Column>,
    /// Columns of the primary key, in index order; empty without one. A deferrable key identifies no row and counts as
    /// none, here and for the source.
    pub primary_key: Vec<String>,
    /// What identifies an old row.
    pub identity: ReplicaIdentity,
    /// The partitioned tables above it, the nearest first; none unless this is a partition.
    pub above: Vec<QualifiedName>,
    /// `pg_class.relpages` as it stands on disk: the heap's size in bytes.
    pub heap_bytes: u64,
    /// Heap and TOAST in bytes, without indexes.
    pub bytes: u64,
}

impl Table {
    /// The topmost partitioned table, if this is a partition.
    #[must_use]
    pub fn root(&self) -> Option<&QualifiedName> {
        self.above.last()
    }
}

/// Tables of extensions and of providers ([`super::provider::SCHEMAS`]) are not ours to move; neither is our own schema.
///
/// `$1` is not used: the text is a condition over `n` (pg_namespace) and `c` (pg_class).
pub const IS_USER_TABLE: &str = r"
    n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'pgtandem')
    AND n.nspname NOT IN ('neon', 'neon_migration', 'google_vacuum_mgmt')
    AND n.nspname !~ '^pg_(temp|toast_temp)_'
    AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_depend d
        WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.deptype = 'e')";

/// Whether the stream carries a key: a condition over all its columns, as `a` (pg_attribute), for HAVING.
pub const KEY_IS_PUBLISHED: &str =
    "NOT bool_or(a.attgenerated <> '') OR pg_catalog.current_setting('server_version_num')::int4 >= 180000";

/// The partitioned tables above `c` (pg_class), the nearest first, as the columns `above.schemas` and `above.names`; a
/// lateral item of a FROM clause. Read by [`above`].
pub const ABOVE: &str = r"
    LATERAL (
        SELECT COALESCE(array_agg(an.nspname::text ORDER BY up.ord), '{}') AS schemas,
               COALESCE(array_agg(a.relname::text ORDER BY up.ord), '{}') AS names
        FROM pg_catalog.pg_partition_ancestors(c.oid) WITH ORDINALITY up (relid, ord)
        JOIN pg_catalog.pg_class a ON a.oid = up.relid
        JOIN pg_catalog.pg_namespace an ON an.oid = a.relnamespace
        WHERE up.relid <> c.oid) above";

/// The names that [`ABOVE`] found, from the column `at` (the schemas) and the next one.
///
/// # Errors
/// The columns are others.
pub fn above(row: &tokio_postgres::Row, at: usize) -> Result<Vec<QualifiedName>> {
    let (schemas, names): (Vec<String>, Vec<String>) = (row.try_get(at)?, row.try_get(at + 1)?);
    Ok(schemas.into_iter().zip(names).map(|(schema, name)| QualifiedName { schema, name }).collect())
}

/// Those of [`tables`] that move.
///
/// # Errors
/// The connection's.
pub async fn tables_in_scope(client: &impl tokio_postgres::GenericClient, scope: &Scope) -> Result<Vec<Table>> {
    let mut tables = tables(client).await?;
    tables.retain(|table| scope.contains(&table.name, &table.above));
    Ok(tables)
}

/// A table of any kind, also one that stores no rows of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `pg_class.oid`
    pub oid: u32,
    /// Whether its definition moves: it is in scope, or it is a partitioned table above one that is.
    pub travels: bool,
}

/// All ordinary, partitioned and foreign user tables that are not temporary, by name.
///
/// # Errors
/// The connection's.
pub async fn members(
    client: &impl tokio_postgres::GenericClient,
    scope: &Scope,
) -> Result<HashMap<QualifiedName, Member>> {
    let sql = format!(
        "SELECT c.oid, n.nspname::text, c.relname::text, above.schemas, above.names
         FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         CROSS JOIN {ABOVE}
         WHERE c.relkind IN ('r', 'p', 'f') AND c.relpersistence <> 't' AND {IS_USER_TABLE}"
    );
    let rows = client.query(&sql, &[]).await.doing(|| "listing the tables of the scope")?;
    let mut members = HashMap::with_capacity(rows.len());
    let mut needed = Vec::new();
    for row in &rows {
        let (name, above) = (QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? }, above(row, 3)?);
        let travels = scope.contains(&name, &above);
        if travels {
            needed.extend(above);
        }
        members.insert(name, Member { oid: row.try_get(0)?, travels });
    }
    for name in &needed {
        if let Some(member) = members.get_mut(name) {
            member.travels = true;
        }
    }
    Ok(members)
}

/// All unlogged user tables that store rows, largest first: what they hold is in no WAL, and so in no stream.
///
/// # Errors
/// The connection's.
pub async fn unlogged_tables(client: &impl tokio_postgres::GenericClient) -> Result<Vec<Table>> {
    tables_of(client, "u").await
}

/// All user tables that store rows, largest first.
///
/// A virtual generated column cannot be published, so a whole row that holds one identifies nothing. Before 18 the same is
/// true of a stored one as a part of a key. A table that is dropped meanwhile has no size.
///
/// # Errors
/// The connection's.
pub async fn tables(client: &impl tokio_postgres::GenericClient) -> Result<Vec<Table>> {
    tables_of(client, "p").await
}

/// `persistence` as in `pg_class.relpersistence`.
async fn tables_of(client: &impl tokio_postgres::GenericClient, persistence: &str) -> Result<Vec<Table>> {
    let sql = format!(
        r"
        SELECT c.oid, n.nspname, c.relname,
               CASE WHEN c.relreplident = 'f' AND cols.has_virtual THEN 'n' ELSE c.relreplident::text END,
               cols.names, cols.types, cols.generated, cols.identity_always,
               COALESCE(pk.columns, '{{}}'), COALESCE(ri.columns, '{{}}'),
               above.schemas, above.names,
               COALESCE(pg_catalog.pg_relation_size(c.oid), 0),
               -- Less work than pg_table_size, which opens every relation.
               COALESCE(pg_catalog.pg_relation_size(c.oid), 0)
                   + COALESCE(pg_catalog.pg_relation_size(NULLIF(c.reltoastrelid, 0)), 0)
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL (
            SELECT COALESCE(array_agg(a.attname::text ORDER BY a.attnum), '{{}}') AS names,
                   COALESCE(array_agg(pg_catalog.format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum), '{{}}') AS types,
                   COALESCE(array_agg(a.attgenerated <> '' ORDER BY a.attnum), '{{}}') AS generated,
                   COALESCE(array_agg(a.attidentity = 'a' ORDER BY a.attnum), '{{}}') AS identity_always,
                   COALESCE(bool_or(a.attgenerated = 'v'), false) AS has_virtual
            FROM pg_catalog.pg_attribute a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) cols
        LEFT JOIN LATERAL (
            SELECT array_agg(a.attname::text ORDER BY k.ord) AS columns
            FROM pg_catalog.pg_index i
            CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
            WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid AND k.ord <= i.indnkeyatts
            HAVING {KEY_IS_PUBLISHED}) pk ON true
        LEFT JOIN LATERAL (
            SELECT array_agg(a.attname::text ORDER BY k.ord) AS columns
            FROM pg_catalog.pg_index i
            CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, ord)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
            WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid AND k.ord <= i.indnkeyatts
            HAVING {KEY_IS_PUBLISHED}) ri ON true
        CROSS JOIN {ABOVE}
        WHERE c.relkind = 'r' AND c.relpersistence = '{persistence}' AND {IS_USER_TABLE}
        ORDER BY 14 DESC, 2, 3"
    );
    let rows = client.query(&sql, &[]).await.doing(|| "listing the tables")?;
    rows.iter().map(table).collect()
}

fn table(row: &tokio_postgres::Row) -> Result<Table> {
    let names: Vec<String> = row.try_get(4)?;
    let types: Vec<String> = row.try_get(5)?;
    let generated: Vec<bool> = row.try_get(6)?;
    let identity_always: Vec<bool> = row.try_get(7)?;
    let columns = names
        .into_iter()
        .zip(types)
        .zip(generated.into_iter().zip(identity_always))
        .map(|((name, type_name), (generated, identity_always))| Column { name, type_name, generated, identity_always })
        .collect();
    let primary_key: Vec<String> = row.try_get(8)?;
    let index: Vec<String> = row.try_get(9)?;
    let identity = match row.try_get::<_, String>(3)?.as_str() {
        "f" => ReplicaIdentity::Full,
        "i" if !index.is_empty() => ReplicaIdentity::Key(index),
        "d" if !primary_key.is_empty() => ReplicaIdentity::Key(primary_key.clone()),
        _ => ReplicaIdentity::Nothing,
    };
    Ok(Table {
        oid: row.try_get(0)?,
        name: QualifiedName { schema: row.try_get(1)?, name: row.try_get(2)? },
        columns,
        primary_key,
        identity,
        above: above(row, 10)?,
        heap_bytes: u64::try_from(row.try_get::<_, i64>(12)?).unwrap_or(0),
        bytes: u64::try_from(row.try_get::<_, i64>(13)?).unwrap_or(0),
    })
}

/// Where the log of a server ends that is no standby.
///
/// # Errors
/// The connection's.
pub async fn end_of_log(client: &impl tokio_postgres::GenericClient) -> Result<Lsn> {
    let row = client
        .query_one("SELECT pg_catalog.pg_current_wal_lsn()::text", &[])
        .await
        .doing(|| "asking for the end of the log")?;
    row.try_get::<_, &str>(0)?.parse().map_err(|e: InvalidLsn| Error::bug(e.to_string()))
}

/// A sequence and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Schema and name.
    pub name: QualifiedName,
    /// `last_value`
    pub last_value: i64,
    /// Whether `last_value` was handed out already.
    pub is_called: bool,
}

/// A sequence by name, and the table that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceName {
    /// Schema and name.
    pub name: QualifiedName,
    /// The table of the serial or identity column behind it.
    pub owner: Option<QualifiedName>,
}

/// All permanent user sequences.
///
/// # Errors
/// The connection's.
pub async fn sequence_names(client: &impl tokio_postgres::GenericClient) -> Result<Vec<SequenceName>> {
    let rows = client
        .query(
            &format!(
                "SELECT n.nspname, c.relname, owner.schema_name, owner.table_name
                 FROM pg_catalog.pg_class c
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 LEFT JOIN LATERAL (
                     SELECT tn.nspname AS schema_name, t.relname AS table_name
                     FROM pg_catalog.pg_depend d
                     JOIN pg_catalog.pg_class t ON t.oid = d.refobjid
                     JOIN pg_catalog.pg_namespace tn ON tn.oid = t.relnamespace
                     WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                       AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.deptype IN ('a', 'i')
                       AND d.refobjsubid > 0
                     LIMIT 1) owner ON true
                 WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND {IS_USER_TABLE} ORDER BY 1, 2"
            ),
            &[],
        )
        .await
        .doing(|| "listing the sequences")?;
    rows.iter()
        .map(|row| {
            let owner = match (row.try_get::<_, Option<String>>(2)?, row.try_get::<_, Option<String>>(3)?) {
                (Some(schema), Some(name)) => Some(QualifiedName { schema, name }),
                _ => None,
            };
            Ok(SequenceName { name: QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }, owner })
        })
        .collect()
}

/// Where these sequences stand, in one round trip.
///
/// `pg_sequence_last_value` hides the state before the first call, so each sequence is read itself.
///
/// # Errors
/// The connection's, or no SELECT privilege on a sequence.
pub async fn sequence_values(
    client: &impl tokio_postgres::GenericClient,
    names: &[QualifiedName],
) -> Result<Vec<Sequence>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let union = names
        .iter()
        .enumerate()
        .map(|(at, name)| format!("SELECT {at}::int4 AS at, last_value, is_called FROM {name}"))
        .collect::<Vec<_>>()
        .join(" UNION ALL ");
    let rows = client.query(&union, &[]).await.doing(|| "reading the sequences")?;
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let at = usize::try_from(row.try_get::<_, i32>(0)?).unwrap_or(usize::MAX);
        if let Some(name) = names.get(at) {
            found.push(Sequence { name: name.clone(), last_value: row.try_get(1)?, is_called: row.try_get(2)? });
        }
    }
    Ok(found)
}
