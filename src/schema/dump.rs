//! Taking the schema out of the source.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::allowed::DefaultPrivileges;
use super::child::Child;
use super::left_out::LeftOut;
use super::toc::{Contents, Context};
use super::{ForeignKeys, Programs};
use crate::config::Scope;
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{QualifiedName, Server, Session, provider};

/// How long pg_dump waits for a lock, in milliseconds. Waiting longer would queue the application behind it.
const LOCK_WAIT_MILLIS: u32 = 5_000;
/// What pg_dump's sessions on the source are called.
pub(super) const DUMP: &str = "schema";
/// How often it tries before the error is handed up.
const LOCK_ATTEMPTS: u32 = 5;
/// The schema of moves never travels, and neither do those of [`provider::SCHEMAS`].
const OUR_SCHEMA: &str = "pgtandem";

/// What to dump and how.
#[derive(Clone, Copy)]
pub struct DumpRequest<'a> {
    /// Where from.
    pub source: &'a Server,
    /// Client programs that fit both servers.
    pub programs: &'a Programs,
    /// Which tables travel.
    pub scope: &'a Scope,
    /// An exported snapshot, held by another session; `None` for the present.
    pub snapshot: Option<&'a str>,
}

/// The schema of a source in a private temporary folder, gone when dropped.
pub struct Archive {
    folder: TempDir,
    pub(super) contents: Contents,
    pub(super) foreign_keys: ForeignKeys,
    pub(super) materialized_views: Vec<QualifiedName>,
    pub(super) tablespaces: Vec<String>,
    pub(super) default_privileges: Vec<DefaultPrivileges>,
}

impl Archive {
    /// Kind and name of everything that stays behind, for the log.
    #[must_use]
    pub fn left_out(&self) -> &[String] {
        &self.contents.left_out
    }

    /// The foreign keys, for targets where they can only be added at the cutover.
    #[must_use]
    pub fn foreign_keys(&self) -> &ForeignKeys {
        &self.foreign_keys
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(super) fn file(&self) -> PathBuf {
        self.folder.path().join("schema.dump")
    }
}

/// Dumps the schema. Changes nothing on the source and holds no lock longer than pg_dump does.
///
/// # Errors
/// As [`super::failure`] reads them; class retry when a lock could not be had.
pub async fn dump(request: DumpRequest<'_>) -> Result<Archive> {
    dump_schema(request).await.doing(|| "dumping the schema of the source")
}

async fn dump_schema(request: DumpRequest<'_>) -> Result<Archive> {
    let session = request.source.connect("schema").await?;
    let left_out = LeftOut::find(&*session, request.scope).await?;
    let folder = tempfile::Builder::new().prefix("pgtandem-schema-").tempdir()?;
    let file = folder.path().join("schema.dump");
    with_patience(|| pg_dump(request, &left_out).arg("--format=custom").arg("--schema-only").arg("--file").arg(&file))
        .await?;
    let foreign_keys = ForeignKeys::read(&session, &left_out.objects).await?;
    let materialized_views = populated_views(&session, &left_out.objects).await?;
    let tablespaces = used_tablespaces(&session).await?;
    let default_privileges = DefaultPrivileges::read(&*session).await?;
    let context = context(&session, left_out.objects).await?;
    let contents = contents(request.programs, &file, &context).await?;
    Ok(Archive { folder, contents, foreign_keys, materialized_views, tablespaces, default_privileges })
}

/// A pg_dump of what is in scope; format and sections are the caller's.
pub(super) fn pg_dump(request: DumpRequest<'_>, left_out: &LeftOut) -> Child {
    Child::new(request.programs.pg_dump())
        .server(request.source, DUMP)
        .args(["--no-password", "--no-publications", "--no-subscriptions"])
        .arg(format!("--lock-wait-timeout={LOCK_WAIT_MILLIS}"))
        .args([OUR_SCHEMA].into_iter().chain(provider::SCHEMAS).map(|name| format!("--exclude-schema={name}")))
        .args(request.snapshot.map(|snapshot| format!("--snapshot={snapshot}")))
        .args(left_out.arguments())
}

/// Runs a pg_dump again when it could not get a lock in time.
async fn with_patience(child: impl Fn() -> Child) -> Result<()> {
    with_patience_for(child, |_| {}).await
}

/// The same; `on_line` sees what each attempt says.
pub(super) async fn with_patience_for(child: impl Fn() -> Child, on_line: impl Fn(&str)) -> Result<()> {
    let mut attempt = 1;
    loop {
        match child().run_watched(&on_line).await {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == "lock_not_available" && attempt < LOCK_ATTEMPTS => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

async fn contents(programs: &Programs, file: &Path, context: &Context) -> Result<Contents> {
    let list = |option: &'static str| Child::new(programs.pg_restore()).args(["--list", option]).arg(file).run();
    let (before, after, verbose) =
        tokio::try_join!(list("--section=pre-data"), list("--section=post-data"), list("--verbose"))?;
    Ok(Contents::sort(&before, &after, &verbose, context))
}

async fn context(session: &Session, left_out: HashSet<(u32, u32)>) -> Result<Context> {
    let names = async |sql: &str| -> Result<HashSet<String>> {
        let rows = session.query(sql, &[]).await.doing(|| "reading the names of schemas and roles")?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    };
    // The list shows line breaks as spaces.
    let schemas = names(r"SELECT translate(nspname, E'\n\r', '  ') FROM pg_catalog.pg_namespace").await?;
    let roles = names(r"SELECT translate(rolname, E'\n\r', '  ') FROM pg_catalog.pg_roles").await?;
    let bootstrap_role = names("SELECT rolname::text FROM pg_catalog.pg_roles WHERE oid = 10").await?;
    Ok(Context { schemas, roles, left_out, bootstrap_role: bootstrap_role.into_iter().next().unwrap_or_default() })
}

async fn populated_views(session: &Session, left_out: &HashSet<(u32, u32)>) -> Result<Vec<QualifiedName>> {
    let rows = session
        .query(
            &format!(
                "SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid, c.oid, n.nspname, c.relname
                 FROM pg_catalog.pg_class c
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind = 'm' AND c.relispopulated AND {}
                 ORDER BY c.oid",
                crate::postgres::catalog::IS_USER_TABLE
            ),
            &[],
        )
        .await
        .doing(|| "listing the materialized views")?;
    let mut views = Vec::new();
    for row in &rows {
        if !left_out.contains(&(row.try_get(0)?, row.try_get(1)?)) {
            views.push(QualifiedName { schema: row.try_get(2)?, name: row.try_get(3)? });
        }
    }
    Ok(views)
}

async fn used_tablespaces(session: &Session) -> Result<Vec<String>> {
    let rows = session
        .query(
            "SELECT DISTINCT t.spcname::text FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_tablespace t ON t.oid = c.reltablespace WHERE t.spcname <> 'pg_global'",
            &[],
        )
        .await
        .doing(|| "listing the tablespaces in use")?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// The two sides do not agree on what there is.
pub(super) fn schema_differs(what: impl Into<String>) -> Error {
    Error::new(Class::Operator, "schema_differs", what)
}
