//! What the target's role may restore, asked of the target just before: what it would refuse is left out and named, so that
//! it does not stop a restore that is nearly done.

use std::collections::HashSet;

use tokio_postgres::error::SqlState;

use super::toc::Entry;
use crate::error::{Doing, Error, Result};
use crate::postgres::{Session, provider, quote_identifier};

/// Makes an event trigger, for a transaction that is rolled back: whether the role may. Nobody else sees it meanwhile.
pub const PROBE_EVENT_TRIGGER: &str = "
    CREATE FUNCTION pg_temp.pgtandem_probe() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
    CREATE EVENT TRIGGER pgtandem_probe ON sql_drop EXECUTE FUNCTION pg_temp.pgtandem_probe()";

/// Each `ALTER DEFAULT PRIVILEGES` of the source: the role that it is for, and every role that it names.
pub const DEFAULT_PRIVILEGES: &str = r"
    SELECT d.oid, o.rolname::text, COALESCE(n.nspname::text, ''),
           ARRAY(SELECT DISTINCT g.rolname::text
                 FROM pg_catalog.aclexplode(d.defaclacl) a JOIN pg_catalog.pg_roles g ON g.oid = a.grantee ORDER BY 1)
    FROM pg_catalog.pg_default_acl d
    JOIN pg_catalog.pg_roles o ON o.oid = d.defaclrole
    LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace
    ORDER BY 2, 3, 1";

/// `$1`: names of roles. Those that are there, and whether we may set their default privileges: before 16 a member may, from
/// 16 on one that inherits.
pub const ROLES_AND_OURS: &str = r"
    SELECT r.rolname::text,
           pg_catalog.pg_has_role(r.oid, CASE WHEN pg_catalog.current_setting('server_version_num')::int4 < 160000
                                              THEN 'MEMBER' ELSE 'USAGE' END)
    FROM pg_catalog.pg_roles r WHERE r.rolname = ANY ($1)";

/// `$1`: a schema's name. Its owner, and whether it is ours to give away.
const SCHEMA_OWNER: &str = r"
    SELECT pg_catalog.pg_get_userbyid(n.nspowner)::text, pg_catalog.pg_has_role(n.nspowner, 'USAGE')
    FROM pg_catalog.pg_namespace n WHERE n.nspname = $1";

/// Whether the server's own catalog is ours to grant on.
pub const OWNS_CATALOG: &str =
    "SELECT pg_catalog.pg_has_role(nspowner, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = 'pg_catalog'";

/// One `ALTER DEFAULT PRIVILEGES` of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultPrivileges {
    /// `pg_default_acl.oid`
    pub oid: u32,
    /// Whose objects they are for.
    pub role: String,
    /// Within which schema; empty for all.
    pub schema: String,
    /// Who is granted something.
    pub grantees: Vec<String>,
}

impl DefaultPrivileges {
    /// All of the source.
    ///
    /// # Errors
    /// The connection's.
    pub async fn read(client: &impl tokio_postgres::GenericClient) -> Result<Vec<Self>> {
        let rows = client.query(DEFAULT_PRIVILEGES, &[]).await.doing(|| "listing default privileges")?;
        rows.iter()
            .map(|row| {
                Ok(Self {
                    oid: row.try_get(0)?,
                    role: row.try_get(1)?,
                    schema: row.try_get(2)?,
                    grantees: row.try_get(3)?,
                })
            })
            .collect()
    }

    /// For people.
    #[must_use]
    pub fn plain(&self) -> String {
        match self.schema.as_str() {
            "" => format!("default privileges for {}", self.role),
            schema => format!("default privileges for {} in {schema}", self.role),
        }
    }
}

/// Which roles the target has, and for which of them we may act.
pub struct TargetRoles {
    there: HashSet<String>,
    ours: HashSet<String>,
}

impl TargetRoles {
    /// Asks for those that these default privileges name.
    ///
    /// # Errors
    /// The connection's.
    pub async fn of(target: &impl tokio_postgres::GenericClient, all: &[DefaultPrivileges]) -> Result<Self> {
        let names: Vec<&String> = all.iter().flat_map(|one| one.grantees.iter().chain([&one.role])).collect();
        let rows = target.query(ROLES_AND_OURS, &[&names]).await.doing(|| "asking for the target's roles")?;
        let (mut there, mut ours) = (HashSet::new(), HashSet::new());
        for row in &rows {
            let name: String = row.try_get(0)?;
            if row.try_get(1)? {
                ours.insert(name.clone());
            }
            there.insert(name);
        }
        Ok(Self { there, ours })
    }

    /// Why the target would refuse them; `None` where it takes them.
    #[must_use]
    pub fn refuse(&self, privileges: &DefaultPrivileges) -> Option<Refusal> {
        let missing: Vec<String> = privileges
            .grantees
            .iter()
            .chain([&privileges.role])
            .filter(|role| !self.there.contains(*role))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Some(Refusal::Missing(missing));
        }
        (!self.ours.contains(&privileges.role)).then(|| Refusal::NotOurs(privileges.role.clone()))
    }
}

/// Why default privileges cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// These roles are not there.
    Missing(Vec<String>),
    /// We are not a member of the role whose objects they are for.
    NotOurs(String),
}

/// Oids of the default privileges that the target refuses; each is named in the log.
pub(super) async fn refused_default_privileges(target: &Session, all: &[DefaultPrivileges]) -> Result<HashSet<u32>> {
    if all.is_empty() {
        return Ok(HashSet::new());
    }
    let roles = TargetRoles::of(&**target, all).await?;
    let mut refused = HashSet::new();
    for privileges in all {
        let why = match roles.refuse(privileges) {
            None => continue,
            Some(Refusal::Missing(roles)) => format!("the target lacks {}", roles.join(", ")),
            Some(Refusal::NotOurs(role)) => format!("the target's role may not act for {role}"),
        };
        tracing::warn!("left out: {}: {why}", privileges.plain());
        refused.insert(privileges.oid);
    }
    Ok(refused)
}

/// Whether the entry is, or hangs on, an event trigger: its comment and its label go where it goes.
pub(super) fn of_event_trigger(entry: &Entry) -> bool {
    entry.kind == "EVENT TRIGGER" || entry.schema.is_none() && entry.tag.starts_with("EVENT TRIGGER ")
}

/// Whether the entry grants something on the server's own catalog. Providers do so for roles of theirs, in every database.
fn is_grant_on_catalog(entry: &Entry) -> bool {
    entry.kind == "ACL" && matches!(entry.schema.as_deref(), Some("pg_catalog" | "information_schema"))
}

/// The entries without the grants that only the owner of the server's own catalog can make; those are named in the log.
pub(super) async fn without_refused_grants<'e>(target: &Session, entries: Vec<&'e Entry>) -> Result<Vec<&'e Entry>> {
    if !entries.iter().any(|entry| is_grant_on_catalog(entry)) {
        return Ok(entries);
    }
    let row = target.query_one(OWNS_CATALOG, &[]).await.doing(|| "asking who owns the target's catalog")?;
    if row.try_get(0)? {
        return Ok(entries);
    }
    let (refused, allowed): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| is_grant_on_catalog(entry));
    for entry in refused {
        tracing::warn!("left out: grants on {}, which the target refuses to its role", entry.plain());
    }
    Ok(allowed)
}

pub(super) async fn event_triggers_allowed(session: &Session) -> Result<bool> {
    let outcome = session.batch_execute(&format!("BEGIN; {PROBE_EVENT_TRIGGER}")).await;
    session.batch_execute("ROLLBACK").await.doing(|| "probing event triggers")?;
    match outcome {
        Ok(()) => Ok(true),
        Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(false),
        Err(e) => Err(Error::from(e).doing("probing event triggers")),
    }
}

/// Gives a schema that was there before us the owner that it has on the source, except where that is a provider's. Answers
/// whether the schema was ours to give; if not, it keeps its owner, which the log says.
pub(super) async fn give_schema(target: &Session, schema: &str, owner: &str) -> Result<bool> {
    let row =
        target.query_opt(SCHEMA_OWNER, &[&schema]).await.doing(|| format!("asking who owns the schema {schema}"))?;
    let Some(row) = row else { return Ok(true) };
    let (now, ours): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
    if now == owner || owner.is_empty() || provider::ROLES.contains(&owner) {
        return Ok(ours);
    }
    if !ours {
        tracing::warn!("the schema {schema} stays with {now} on the target: its role may not give it to {owner}");
        return Ok(false);
    }
    let sql = format!("ALTER SCHEMA {} OWNER TO {}", quote_identifier(schema), quote_identifier(owner));
    target.batch_execute(&sql).await.doing(|| format!("giving the schema {schema} to {owner}"))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn privileges(role: &str, grantees: &[&str]) -> DefaultPrivileges {
        let grantees = grantees.iter().map(|&name| name.to_owned()).collect();
        DefaultPrivileges { oid: 1, role: role.into(), schema: String::new(), grantees }
    }

    #[test]
    fn every_role_that_is_named_must_be_there_and_the_owner_ours() {
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let roles = TargetRoles { there: set(&["app", "boss", "reader"]), ours: set(&["app"]) };
        assert_eq!(roles.refuse(&privileges("app", &["reader"])), None);
        assert_eq!(roles.refuse(&privileges("app", &["gone"])), Some(Refusal::Missing(vec!["gone".into()])));
        assert_eq!(roles.refuse(&privileges("boss", &["reader"])), Some(Refusal::NotOurs("boss".into())));
    }
}
