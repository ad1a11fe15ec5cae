//! What there is to copy: the source's tables as the cut shows them, and what the target holds already.

use std::collections::{HashMap, HashSet};

use super::division;
use super::plan::{self, Candidate, Plan, Splitting};
use super::{Context, blockers, gone, late, shown};
use crate::config;
use crate::error::{Doing, Result};
use crate::postgres::catalog::{self, IS_USER_TABLE, Table};
use crate::postgres::replication::Cut;
use crate::postgres::{QualifiedName, Session};
use crate::state::{Begun, TableRecord, TableState};

/// `$1`: oids of tables, `$2`: names of our publications. What tells a table from another one, and from itself before it was rewritten,
/// its columns changed, or the stream told of its changes in another way, or not at all: that it is published by the same entry
/// (of its own, or of a partitioned table above it, to which it always belonged), and what identifies its rows. As long as this is the
/// same, a row that nobody touched stands where it stood, and whoever touched one is in the stream.
const SHAPES: &str = "
    SELECT c.oid,
           pg_catalog.concat_ws(' ', c.oid, c.relfilenode, c.relreplident,
               (SELECT pg_catalog.hashtextextended(string_agg(pg_catalog.concat_ws(' ', a.attnum, pg_catalog.quote_ident(a.attname),
                       pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated), ', ' ORDER BY a.attnum), 0)
                FROM pg_catalog.pg_attribute a
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
               (SELECT string_agg(i.indexrelid || ':' || i.indkey::text, ',' ORDER BY i.indexrelid)
                FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident)),
               (SELECT string_agg(r.oid::text, ',' ORDER BY r.oid)
                FROM pg_catalog.pg_publication_rel r
                JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid AND p.pubname = ANY ($2)
                WHERE r.prrelid = c.oid OR r.prrelid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(c.oid))),
               (SELECT string_agg(h.inhparent || ':' || h.xmin::text, ',' ORDER BY h.inhparent)
                FROM pg_catalog.pg_inherits h
                WHERE h.inhrelid = c.oid OR h.inhrelid IN (SELECT relid FROM pg_catalog.pg_partition_ancestors(c.oid))))
    FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1)";

/// Types whose binary form is the same from 13 to 18, whatever a server is set to; their arrays as well.
const ALIKE: &str = "bool bytea char name int8 int2 int4 text oid json point lseg path box polygon line circle float4 float8 cidr inet \
    macaddr macaddr8 bpchar varchar date time timestamp timestamptz interval timetz bit varbit numeric uuid jsonb money \
    int4range int8range numrange daterange tsrange tstzrange";

/// Per table a digest over its columns' names and types, if all of them have a binary form that every server reads alike. The array of
/// a built-in type holds that type's oid, which never changes; what is built of a user's types holds oids that differ between
/// servers. A value of an enum is its label.
fn forms() -> String {
    format!(
        "WITH RECURSIVE base (oid, base) AS (
             SELECT t.oid, t.oid FROM pg_catalog.pg_type t WHERE t.typtype <> 'd'
             UNION ALL
             SELECT d.oid, b.base FROM base b JOIN pg_catalog.pg_type d ON d.typtype = 'd' AND d.typbasetype = b.oid),
         form (oid, form) AS (
             SELECT b.oid, CASE
                 WHEN t.oid < 16384 AND COALESCE(e.typname, t.typname)::text = ANY (pg_catalog.string_to_array('{ALIKE}', ' '))
                     THEN t.typname::text
                 WHEN t.typtype = 'e' THEN pg_catalog.format('%I.%I', n.nspname, t.typname) END
             FROM base b
             JOIN pg_catalog.pg_type t ON t.oid = b.base
             JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
             LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem AND t.typlen = -1 AND t.typcategory = 'A')
         SELECT n.nspname::text, c.relname::text, pg_catalog.hashtextextended(
             string_agg(pg_catalog.quote_ident(a.attname) || ' ' || f.form, ', ' ORDER BY a.attname), 0)
         FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
         LEFT JOIN form f ON f.oid = a.atttypid
         WHERE c.relkind = 'r' AND {IS_USER_TABLE}
         GROUP BY 1, 2
         HAVING bool_and(f.form IS NOT NULL)"
    )
}

/// See the module's first lines.
pub(super) struct Survey {
    candidates: Vec<Candidate>,
    records: Vec<TableRecord>,
    begun: HashMap<QualifiedName, Begun>,
    splitting: Splitting,
}

impl Survey {
    /// Reads the catalog as the cut shows it, and writes down which tables there are to copy.
    pub(super) async fn take(context: &Context, cut: &Cut) -> Result<Self> {
        let session = context.source.connect("copy").await?;
        let copied = context.store.tables().await?.into_iter().filter(|table| table.state == TableState::Copied);
        let copied: HashSet<QualifiedName> = copied.map(|table| table.name).collect();
        let target = context.target.connect("copy").await?;
        let tables = shown(&session, &context.scope, context.store.name(), cut, &copied);
        // The size of a table is told to whoever can lock it.
        let pid = session.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.try_get(0)?;
        let what = "reading the sizes of tables on the source";
        let tables = blockers::explained(&context.source, pid, what, &context.telemetry, tables);
        let (tables, there) = tokio::try_join!(tables, tables_by_form(&target))?;
        let splitting = splitting(&session, &context.settings).await?;
        let late = late(&session).await?;
        let begun = begun(context).await?;
        let is_large = |table: &&Table| table.bytes > context.settings.split_above || begun.contains_key(&table.name);
        let wanted = tables.iter().filter(|table| !copied.contains(&table.name)).filter(is_large);
        let wanted: Vec<&Table> = wanted.collect();
        let publications = context.store.name().publications();
        let shapes = shapes(&session, wanted.iter().map(|table| table.oid).collect(), &publications).await?;
        let of_this_shape = |table: &Table, begun: &&Begun| shapes.get(&table.oid) == Some(&begun.shape);
        let wanted =
            wanted.iter().map(|table| (*table, begun.get(&table.name).filter(|begun| of_this_shape(table, begun))));
        let mut divisions = division::find(context, (&session, pid), splitting, &wanted.collect::<Vec<_>>()).await?;
        let mut alike = tables_by_form(&session).await?;
        alike.retain(|name, form| there.get(name) == Some(form));
        session.batch_execute("COMMIT").await?;
        let tables = without_those_to_come(context, &target, tables).await?;
        let sizes: Vec<(QualifiedName, u64)> = tables.iter().map(|table| (table.name.clone(), table.bytes)).collect();
        context.store.plan_tables(&sizes).await?;
        let mut records = context.store.tables().await?;
        if gone::settle(context, &records, &tables, cut.lsn).await? {
            records = context.store.tables().await?;
        }
        let candidate = |table: Table| Candidate {
            shape: shapes.get(&table.oid).cloned().unwrap_or_default(),
            division: divisions.remove(&table.oid),
            binary: alike.contains_key(&table.name),
            late: late.contains(&table.oid),
            table,
        };
        let candidates = tables.into_iter().map(candidate).collect();
        Ok(Self { candidates, records, begun, splitting })
    }

    /// Tells telemetry of every table, and what of it is there.
    pub(super) fn tell(&self, context: &Context) {
        for record in &self.records {
            let (rows, bytes) = match (record.state, self.begun.get(&record.name)) {
                (TableState::Copied, _) => (record.rows, record.bytes),
                (_, Some(begun)) => {
                    let there = plan::total(&begun.units);
                    (there.rows, there.bytes)
                }
                _ => (0, 0),
            };
            context.telemetry.copy_table(&record.name, record.state, rows, bytes, record.bytes_total);
        }
    }

    /// Tables whose rows are all there.
    pub(super) fn copied(&self) -> impl Iterator<Item = &QualifiedName> {
        self.records.iter().filter(|record| record.state == TableState::Copied).map(|record| &record.name)
    }

    /// What is there of this table counts no more.
    pub(super) fn begin_anew(&mut self, table: &QualifiedName) {
        self.begun.remove(table);
    }

    pub(super) fn plan(&self, settings: &config::Copy) -> Plan {
        plan::plan(self.candidates.clone(), &self.records, &self.begun, &settings.first, self.splitting)
    }
}

/// What the target holds of tables that were begun, as far as the source still has all that changed in them since: what was
/// followed already is not in the slot any more.
async fn begun(context: &Context) -> Result<HashMap<QualifiedName, Begun>> {
    let progress = context.store.progress().await?.lsn;
    let mut begun = context.store.begun().await?;
    begun.retain(|_, begun| begun.units.iter().all(|unit| progress <= unit.cut_lsn));
    Ok(begun)
}

async fn shapes(session: &Session, oids: Vec<u32>, publications: &[String]) -> Result<HashMap<u32, String>> {
    let rows = session
        .query(SHAPES, &[&oids, &publications])
        .await
        .doing(|| "looking at the tables that are copied in parts")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Tables whose rows can go over in COPY's binary form, if they have the same digest on both sides.
async fn tables_by_form(session: &Session) -> Result<HashMap<QualifiedName, i64>> {
    let rows = session.query(&forms(), &[]).await.doing(|| "comparing the types of columns")?;
    let one = |row: &tokio_postgres::Row| {
        Ok((QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? }, row.try_get(2)?))
    };
    rows.iter().map(one).collect()
}

/// Under a later cut: a table that the move does not know and the target does not have was made since the first one. Where schema
/// changes come with the stream, it will come with its rows.
async fn without_those_to_come(context: &Context, target: &Session, mut tables: Vec<Table>) -> Result<Vec<Table>> {
    let known: HashSet<QualifiedName> = context.store.tables().await?.into_iter().map(|table| table.name).collect();
    if !context.captured || known.is_empty() {
        return Ok(tables);
    }
    let there: HashSet<QualifiedName> = catalog::tables(&**target).await?.into_iter().map(|table| table.name).collect();
    tables.retain(|table| known.contains(&table.name) || there.contains(&table.name));
    Ok(tables)
}

/// What is to be known to divide large tables.
async fn splitting(session: &Session, settings: &config::Copy) -> Result<Splitting> {
    let row = session.query_one("SELECT pg_catalog.current_setting('block_size')::int8", &[]).await?;
    let block_size = u64::try_from(row.try_get::<_, i64>(0)?).unwrap_or(8192);
    Ok(Splitting { above: settings.split_above, block_size })
}
