//! The publications on the source: which changes the stream carries.
//!
//! Two of them, always both: one for tables whose every change can be carried, one for tables without a replica
//! identity, of which inserts and truncates are published only. The source refuses an UPDATE of a table that publishes
//! updates without an identity, and a move must never be why an application's statement fails.
//!
//! Both are made before the slot, even if one is empty. The stream reads the catalog as it stood at each change, so
//! a publication that is younger than the slot would be missing for the changes before it.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio_postgres::GenericClient;

use crate::config::Config;
use crate::error::{Class, Doing, Error, Result};
use crate::follow::ddl::capture::Capture;
use crate::postgres::catalog::{IS_USER_TABLE, ReplicaIdentity, Table};
use crate::postgres::{QualifiedName, Server, Session, quote_identifier};
use crate::telemetry::Telemetry;

use super::blockers;

/// A busy source is not held up behind our lock.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '2s'";

/// How many times the locks are asked for before that is an error.
const ATTEMPTS: u32 = 30;

/// Between two attempts others get their turn.
const PAUSE: Duration = Duration::from_secs(2);

const FULL: &str = "insert, update, delete, truncate";
const INSERTS: &str = "insert, truncate";

/// `$1`: the publication. Whether it is one of ours in shape.
const PUBLICATION: &str = "
    SELECT p.puballtables,
           pg_catalog.concat_ws(', ', CASE WHEN p.pubinsert THEN 'insert' END, CASE WHEN p.pubupdate THEN 'update' END,
               CASE WHEN p.pubdelete THEN 'delete' END, CASE WHEN p.pubtruncate THEN 'truncate' END),
           p.pubviaroot, pg_catalog.to_jsonb(p) ->> 'pubgencols' IS NOT DISTINCT FROM 'n'
    FROM pg_catalog.pg_publication p WHERE p.pubname = $1";

/// `$1`: the publication.
const MEMBERS: &str = "
    SELECT n.nspname, c.relname
    FROM pg_catalog.pg_publication p
    JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
    JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE p.pubname = $1";

/// Makes both publications, or brings them to what `tables` asks for; their names are returned. `tables` are those
/// in scope. Safe to run again; changes nothing where nothing changed.
///
/// A partitioned table stands for its partitions, so that those made later are published from their first row,
/// if all of its leaves are in scope and of one kind; otherwise the leaves are listed.
///
/// # Errors
/// No CREATE on the database or no ownership of a table (class operator), locks that are never free (class wait), a
/// publication of this name FOR ALL TABLES (class operator), or the connection's.
pub async fn ensure(source: &Server, config: &Config, tables: &[Table], telemetry: &Telemetry) -> Result<Vec<String>> {
    let session = source.connect("publication").await?;
    session.batch_execute(LOCK_TIMEOUT).await?;
    let roots = roots(&*session).await?;
    let mut wanted = members(tables, &roots, |root| config.scope.contains(root, &[]));
    let capture = Capture::of(&config.name).table();
    if session
        .query_one("SELECT pg_catalog.to_regclass($1) IS NOT NULL", &[&capture.to_string()])
        .await
        .doing(|| "looking for the capture of schema changes")?
        .try_get(0)?
    {
        wanted.inserts.insert(capture);
    }
    let full = Publication { name: config.name.publication(), publish: FULL, members: wanted.full };
    let inserts = Publication { name: config.name.insert_publication(), publish: INSERTS, members: wanted.inserts };
    bring_about(source, &session, [&full, &inserts], telemetry)
        .await
        .doing(|| format!("publishing the tables as {} and {}", full.name, inserts.name))?;
    Ok(vec![full.name, inserts.name])
}

/// Which of `tables` neither publication carries; asked by the copy, after the cut.
pub async fn unpublished(
    client: &impl GenericClient,
    names: [String; 2],
    tables: &[Table],
) -> Result<Vec<QualifiedName>> {
    let rows = client
        .query(
            "SELECT DISTINCT schemaname::text, tablename::text FROM pg_catalog.pg_publication_tables WHERE pubname = ANY ($1)",
            &[&&names[..]],
        )
        .await
        .doing(|| "reading the publications")?;
    let published: BTreeSet<QualifiedName> = rows.iter().map(qualified_name).collect::<Result<_>>()?;
    Ok(tables.iter().filter(|t| !published.contains(&t.name)).map(|t| t.name.clone()).collect())
}

/// What a publication shall be.
struct Publication {
    name: String,
    publish: &'static str,
    members: BTreeSet<QualifiedName>,
}

/// In one transaction: a table that moves from one publication to the other is at every point of the stream in one of
/// them, or its changes in between would be lost.
async fn bring_about(
    source: &Server,
    session: &Session,
    wanted: [&Publication; 2],
    telemetry: &Telemetry,
) -> Result<()> {
    let mut statements = Vec::new();
    for publication in wanted {
        statements.extend(difference(session, publication).await?);
    }
    if statements.is_empty() {
        return Ok(());
    }
    let sql = format!("BEGIN; {}; COMMIT", statements.join("; "));
    let pid: i32 = session.query_one("SELECT pg_catalog.pg_backend_pid()", &[]).await?.try_get(0)?;
    let mut attempt = 1;
    loop {
        let change = async { Ok(session.batch_execute(&sql).await?) };
        match blockers::explained(source, pid, "publishing the tables", telemetry, change).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                session.batch_execute("ROLLBACK").await?;
                match error.sqlstate() {
                    Some("55P03" | "40P01") if attempt < ATTEMPTS => attempt += 1,
                    Some("55P03") => {
                        return Err(error
                            .reclassed(Class::Wait)
                            .hint("a vacuum, an index build or a schema change holds one of the tables; see the log"));
                    }
                    // A table was renamed or dropped since the catalog was read.
                    Some("42P01" | "3F000") => return Err(error.reclassed(Class::Retry)),
                    Some("42501") => {
                        return Err(error.hint(
                            "the source's role needs CREATE on the database and must own the tables: \
                             GRANT CREATE ON DATABASE …, and membership in the tables' owner",
                        ));
                    }
                    _ => return Err(error),
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The statements that make a publication what it shall be; none if it is that already.
async fn difference(session: &Session, wanted: &Publication) -> Result<Vec<String>> {
    let name = quote_identifier(&wanted.name);
    // From 18 on the source refuses an UPDATE of a table whose identity holds a generated column that is not published.
    let generated = if super::version(session).await? >= 180_000 { ", publish_generated_columns = stored" } else { "" };
    let options = format!("publish = '{}', publish_via_partition_root = false{generated}", wanted.publish);
    let mut statements = Vec::new();
    let row = session.query_opt(PUBLICATION, &[&wanted.name]).await.doing(|| "looking for the publication")?;
    let present: BTreeSet<QualifiedName> = match row {
        None => {
            statements.push(format!("CREATE PUBLICATION {name} WITH ({options})"));
            BTreeSet::new()
        }
        Some(row) => {
            let (all, publish, via_root): (bool, String, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let without_generated: bool = row.try_get(3)?;
            if all {
                return Err(Error::new(
                    Class::Operator,
                    "publication_name_taken",
                    format!("the source has a publication {} FOR ALL TABLES, which is not ours", wanted.name),
                )
                .hint("drop it, or choose another name for the move"));
            }
            if publish != wanted.publish || via_root || without_generated {
                statements.push(format!("ALTER PUBLICATION {name} SET ({options})"));
            }
            let rows = session.query(MEMBERS, &[&wanted.name]).await.doing(|| "reading the publication")?;
            rows.iter().map(qualified_name).collect::<Result<_>>()?
        }
    };
    let extra: Vec<_> = present.difference(&wanted.members).collect();
    statements.extend(in_pieces(&format!("ALTER PUBLICATION {name} DROP TABLE"), &extra));
    let missing: Vec<_> = wanted.members.difference(&present).collect();
    statements.extend(in_pieces(&format!("ALTER PUBLICATION {name} ADD TABLE"), &missing));
    Ok(statements)
}

/// A statement takes so many tables. Where the source has an event trigger, it keeps a copy of the whole statement for each of them: of
/// 10,000 in one, gigabytes.
const PIECE: usize = 64;

/// ONLY: children by inheritance are members of their own. Of a partitioned table it takes nothing away.
fn in_pieces(what: &str, tables: &[&QualifiedName]) -> Vec<String> {
    let list =
        |tables: &[&QualifiedName]| tables.iter().map(|name| format!("ONLY {name}")).collect::<Vec<_>>().join(", ");
    tables.chunks(PIECE).map(|piece| format!("{what} {}", list(piece))).collect()
}

/// A partitioned table at the top of its tree.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Root {
    /// How many partitions of it hold rows, on disk or elsewhere.
    leaves: usize,
    /// Whether partitions to come will have an identity: a primary key of the root is theirs too.
    has_primary_key: bool,
}

async fn roots(client: &impl GenericClient) -> Result<HashMap<QualifiedName, Root>> {
    let sql = format!(
        "SELECT n.nspname, c.relname,
                (SELECT count(*) FROM pg_catalog.pg_partition_tree(c.oid) t WHERE t.isleaf AND t.relid <> c.oid),
                EXISTS (SELECT FROM pg_catalog.pg_index i
                        WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid)
         FROM pg_catalog.pg_class c
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'p' AND NOT c.relispartition AND c.relpersistence = 'p' AND {IS_USER_TABLE}"
    );
    let rows = client.query(&sql, &[]).await.doing(|| "listing the partitioned tables")?;
    rows.iter()
        .map(|row| {
            let leaves = usize::try_from(row.try_get::<_, i64>(2)?).unwrap_or(0);
            Ok((qualified_name(row)?, Root { leaves, has_primary_key: row.try_get(3)? }))
        })
        .collect()
}

fn qualified_name(row: &tokio_postgres::Row) -> Result<QualifiedName> {
    Ok(QualifiedName { schema: row.try_get(0)?, name: row.try_get(1)? })
}

/// The members of both publications.
#[derive(Debug, Default, PartialEq, Eq)]
struct Members {
    full: BTreeSet<QualifiedName>,
    inserts: BTreeSet<QualifiedName>,
}

impl Members {
    fn add(&mut self, identified: bool, name: &QualifiedName) {
        let list = if identified { &mut self.full } else { &mut self.inserts };
        list.insert(name.clone());
    }
}

/// Decides what is published where. Pure.
fn members(
    tables: &[Table],
    roots: &HashMap<QualifiedName, Root>,
    in_scope: impl Fn(&QualifiedName) -> bool,
) -> Members {
    let identified = |table: &Table| table.identity != ReplicaIdentity::Nothing;
    let mut members = Members::default();
    let mut leaves: HashMap<&QualifiedName, Vec<&Table>> = HashMap::new();
    for table in tables {
        match table.root() {
            Some(root) => leaves.entry(root).or_default().push(table),
            None => members.add(identified(table), &table.name),
        }
    }
    for (name, root) in roots {
        let ours = leaves.remove(name).unwrap_or_default();
        let whole = ours.len() == root.leaves && in_scope(name);
        let of_one_kind = ours.iter().all(|leaf| identified(leaf) == root.has_primary_key);
        if whole && of_one_kind {
            members.add(root.has_primary_key, name);
        } else {
            ours.iter().for_each(|leaf| members.add(identified(leaf), &leaf.name));
        }
    }
    // A root that the catalog did not list: a partition of something that is not ours, or of a moment ago.
    for leaf in leaves.into_values().flatten() {
        members.add(identified(leaf), &leaf.name);
    }
    members
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str, root: Option<&str>, identified: bool) -> Table {
        Table {
            oid: 1,
            name: QualifiedName::new("public", name),
            columns: Vec::new(),
            primary_key: Vec::new(),
            identity: if identified { ReplicaIdentity::Full } else { ReplicaIdentity::Nothing },
            above: root.map(|root| QualifiedName::new("public", root)).into_iter().collect(),
            heap_bytes: 0,
            bytes: 0,
        }
    }

    fn names(members: &BTreeSet<QualifiedName>) -> Vec<&str> {
        members.iter().map(|name| name.name.as_str()).collect()
    }

    fn root(leaves: usize, has_primary_key: bool) -> HashMap<QualifiedName, Root> {
        HashMap::from([(QualifiedName::new("public", "r"), Root { leaves, has_primary_key })])
    }

    #[test]
    fn tables_without_an_identity_publish_inserts_only() {
        let tables = [table("a", None, true), table("b", None, false)];
        let found = members(&tables, &HashMap::new(), |_| true);
        assert_eq!((names(&found.full), names(&found.inserts)), (vec!["a"], vec!["b"]));
    }

    #[test]
    fn a_root_stands_for_leaves_that_are_all_in_scope_and_of_its_kind() {
        let tables = [table("r1", Some("r"), true), table("r2", Some("r"), true)];
        assert_eq!(names(&members(&tables, &root(2, true), |_| true).full), ["r"]);
        assert_eq!(names(&members(&tables, &root(3, true), |_| true).full), ["r1", "r2"], "one is out of scope");
        assert_eq!(names(&members(&tables, &root(2, true), |_| false).full), ["r1", "r2"], "the root is out of scope");
        assert_eq!(names(&members(&tables, &root(2, false), |_| true).full), ["r1", "r2"], "the next leaf has no key");
    }

    #[test]
    fn leaves_of_two_kinds_are_listed() {
        let tables = [table("r1", Some("r"), true), table("r2", Some("r"), false)];
        let found = members(&tables, &root(2, true), |_| true);
        assert_eq!((names(&found.full), names(&found.inserts)), (vec!["r1"], vec!["r2"]));
    }

    #[test]
    fn a_root_without_partitions_publishes_those_to_come() {
        assert_eq!(names(&members(&[], &root(0, true), |_| true).full), ["r"]);
        assert_eq!(names(&members(&[], &root(0, false), |_| true).inserts), ["r"]);
    }
}
