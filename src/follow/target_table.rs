//! A table as the target's catalog describes it: asked for when the first row of the stream needs it.

use crate::error::{Error, Result};
use crate::postgres::wire::TextRow;
use crate::postgres::{QualifiedName, quote_literal};

/// A table as the target's catalog describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TargetTable {
    /// `pg_class.relkind` is `p`.
    pub partitioned: bool,
    /// Something would fire or rewrite when we change a row.
    pub observed: bool,
    pub columns: Vec<TargetColumn>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TargetColumn {
    pub name: String,
    pub type_oid: u32,
    /// What is below a domain, and below the domain that that may be of; else the type itself. The stream names this.
    pub type_name: QualifiedName,
    pub type_modifier: i32,
    pub generated: bool,
    pub primary_key: bool,
    /// The equality of the index that finds rows by this column, as `OPERATOR(schema.=)`.
    pub equality: Option<String>,
    /// An index begins with it, and a value that is cast from text is the one that the input function reads.
    pub leads: bool,
    /// Values that are equal have equal texts, and rows that differ in it conflict in no index.
    pub parts: bool,
    pub many: Many,
}

/// How many values of a column travel in one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Many {
    /// As an array of the column's type, whose elements stand between such delimiters.
    Array { delimiter: u8 },
    /// There are no arrays of an array's type, and an array of a composite comes apart as a table: as an array of text, each cast to the type, which is the same as its input
    /// function where nobody made another cast.
    Text,
    /// Not at all.
    Never,
}

/// `$1` schema, `$2` name.
///
/// A trigger that checks a deferred unique constraint again observes nothing.
///
/// The equality comes from the operator family of an index over the column (the primary key's first), because a type of
/// an extension has its `=` in the extension's schema, which is on no search path of ours.
const TARGET_TABLE: &str = r"
    SELECT c.relkind = 'p', a.attname::text, a.atttypid, tn.nspname::text, t.typname::text, a.atttypmod,
           a.attgenerated <> '', COALESCE(ix.primary_key, false), ix.operator,
           CASE WHEN t.typarray <> 0 AND t.typtype <> 'c' THEN t.typdelim::text
                WHEN own_cast.is_there THEN 'never'
                ELSE 'text' END,
           EXISTS (SELECT FROM pg_catalog.pg_trigger tg JOIN pg_catalog.pg_proc f ON f.oid = tg.tgfoid
                   WHERE (tg.tgrelid = c.oid OR tg.tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree(c.oid)))
                     AND tg.tgenabled::text = ANY (role.firing)
                     AND NOT (f.proname = 'unique_key_recheck' AND f.pronamespace = 'pg_catalog'::pg_catalog.regnamespace))
           OR EXISTS (SELECT FROM pg_catalog.pg_rewrite r
                      WHERE r.ev_class = c.oid AND r.rulename <> '_RETURN' AND r.ev_enabled::text = ANY (role.firing)),
           EXISTS (SELECT FROM pg_catalog.pg_index i
                   JOIN pg_catalog.pg_opclass oc ON oc.oid = i.indclass[0]
                   JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
                   WHERE i.indrelid = c.oid AND i.indkey[0] = a.attnum AND i.indisvalid AND i.indpred IS NULL)
           AND NOT own_cast.is_there,
           t.oid::pg_catalog.regtype = ANY ('{int2,int4,int8,oid,uuid,date,timestamp,timestamptz,bytea,text,varchar}'::pg_catalog.regtype[])
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_collation co WHERE co.oid = a.attcollation AND NOT co.collisdeterministic)
           AND NOT EXISTS (
               SELECT FROM pg_catalog.pg_index i
               WHERE i.indrelid = c.oid
                 AND (i.indisexclusion
                      OR i.indisunique AND a.attnum <> ALL ((i.indkey::int2[])[0:i.indnkeyatts - 1])
                      OR i.indisunique AND EXISTS (
                          SELECT FROM pg_catalog.pg_collation co
                          WHERE co.oid = ANY (i.indcollation::oid[]) AND NOT co.collisdeterministic)))
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    CROSS JOIN (SELECT CASE pg_catalog.current_setting('session_replication_role')
                       WHEN 'replica' THEN ARRAY['A', 'R'] ELSE ARRAY['A', 'O'] END) role (firing)
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN LATERAL (
        WITH RECURSIVE chain AS (
            SELECT y.* FROM pg_catalog.pg_type y WHERE y.oid = a.atttypid
            UNION ALL
            SELECT y.* FROM chain JOIN pg_catalog.pg_type y ON y.oid = chain.typbasetype WHERE chain.typtype = 'd')
        SELECT oid, typname, typnamespace, typtype, typarray, typdelim FROM chain WHERE typtype <> 'd') t ON true
    LEFT JOIN pg_catalog.pg_namespace tn ON tn.oid = t.typnamespace
    CROSS JOIN LATERAL (SELECT EXISTS (
        SELECT FROM pg_catalog.pg_cast x
        WHERE x.castsource = 'pg_catalog.text'::pg_catalog.regtype AND x.casttarget = t.oid AND x.castmethod <> 'b')) own_cast (is_there)
    LEFT JOIN LATERAL (
        SELECT i.indisprimary AND i.indimmediate AS primary_key,
               pg_catalog.format('OPERATOR(%I.%s)', opn.nspname, op.oprname) AS operator
        FROM pg_catalog.pg_index i
        CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indclass::oid[]) k(attnum, opclass)
        JOIN pg_catalog.pg_opclass oc ON oc.oid = k.opclass
        JOIN pg_catalog.pg_am am ON am.oid = oc.opcmethod AND am.amname = 'btree'
        JOIN pg_catalog.pg_amop ao ON ao.amopfamily = oc.opcfamily AND ao.amopstrategy = 3
             AND ao.amoplefttype = oc.opcintype AND ao.amoprighttype = oc.opcintype
        JOIN pg_catalog.pg_operator op ON op.oid = ao.amopopr
        JOIN pg_catalog.pg_namespace opn ON opn.oid = op.oprnamespace
        WHERE i.indrelid = c.oid AND k.attnum = a.attnum AND i.indisvalid AND i.indpred IS NULL
        ORDER BY i.indisprimary DESC, i.indisreplident DESC, i.indisunique DESC, i.indexrelid
        LIMIT 1) ix ON true
    WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')
    ORDER BY a.attnum";

/// Asks for the table in the target's catalog; [`target_table`] reads the answer.
pub(super) fn target_table_query(name: &QualifiedName) -> String {
    TARGET_TABLE.replace("$1", &quote_literal(&name.schema)).replace("$2", &quote_literal(&name.name))
}

/// The table that the rows tell of; `None` if there is none of that name.
pub(super) fn target_table(rows: &[TextRow]) -> Result<Option<TargetTable>> {
    let Some(first) = rows.first() else { return Ok(None) };
    let text = |row: &TextRow, at: usize| row.get(at).cloned().flatten();
    let needed = |row: &TextRow, at: usize| text(row, at).ok_or_else(|| Error::bug("the catalog's answer has a gap"));
    let number = |row: &TextRow, at: usize| -> Result<i64> {
        needed(row, at)?.parse().map_err(|_| Error::bug("the catalog's answer holds no number"))
    };
    let flag = |row: &TextRow, at: usize| text(row, at).as_deref() == Some("t");
    let mut columns = Vec::with_capacity(rows.len());
    for row in rows {
        // A table without columns is one row of NULLs.
        let Some(name) = text(row, 1) else { continue };
        columns.push(TargetColumn {
            name,
            type_oid: u32::try_from(number(row, 2)?).unwrap_or_default(),
            type_name: QualifiedName { schema: needed(row, 3)?, name: needed(row, 4)? },
            type_modifier: i32::try_from(number(row, 5)?).unwrap_or(-1),
            generated: flag(row, 6),
            primary_key: flag(row, 7),
            equality: text(row, 8),
            leads: flag(row, 11),
            parts: flag(row, 12),
            many: match needed(row, 9)?.as_bytes() {
                [delimiter] => Many::Array { delimiter: *delimiter },
                b"text" => Many::Text,
                _ => Many::Never,
            },
        });
    }
    Ok(Some(TargetTable { partitioned: flag(first, 0), observed: flag(first, 10), columns }))
}
