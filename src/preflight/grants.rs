//! Grants on one object as both sides have them, and the statements that make the target's like the source's.

use std::collections::BTreeSet;

use tokio_postgres::Row;

use crate::error::Result;
use crate::postgres::{provider, quote_identifier};

/// What an access list says of anybody but the owner: grantee (empty for PUBLIC), privilege, whether it may be handed on.
/// `acl` and `owner` are columns, `kind` is the letter of `acldefault`.
pub(super) fn exploded(acl: &str, kind: char, owner: &str) -> String {
    format!(
        "SELECT COALESCE(r.rolname::text, ''), a.privilege_type, a.is_grantable
         FROM pg_catalog.aclexplode(COALESCE({acl}, pg_catalog.acldefault('{kind}', {owner}))) a
         LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
         WHERE a.grantee <> {owner} AND (a.grantee = 0 OR r.oid IS NOT NULL)"
    )
}

/// One right of one role.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Grant {
    /// Empty for PUBLIC.
    grantee: String,
    privilege: String,
    grantable: bool,
}

impl Grant {
    /// From the columns of [`exploded`], which begin at `at`.
    pub(super) fn from_row(row: &Row, at: usize) -> Result<Self> {
        Ok(Self { grantee: row.try_get(at)?, privilege: row.try_get(at + 1)?, grantable: row.try_get(at + 2)? })
    }

    fn role(&self) -> String {
        if self.grantee.is_empty() { "PUBLIC".into() } else { quote_identifier(&self.grantee) }
    }
}

/// Statements for what the source grants and the target does not, and for what PUBLIC has on the target only. Rights of roles
/// that the target alone knows are its own business, and so are those of `ours`, of providers and of the server.
pub(super) fn differences(
    source: &BTreeSet<Grant>,
    target: &BTreeSet<Grant>,
    on: &str,
    ours: Option<&str>,
) -> Vec<String> {
    let foreign = |grant: &&Grant| {
        ours != Some(grant.grantee.as_str())
            && !provider::ROLES.contains(&grant.grantee.as_str())
            && !grant.grantee.starts_with("pg_")
    };
    let grants = source.difference(target).filter(foreign).map(|grant| {
        let option = if grant.grantable { " WITH GRANT OPTION" } else { "" };
        format!("GRANT {} ON {on} TO {}{option};", grant.privilege, grant.role())
    });
    let revokes = target
        .difference(source)
        .filter(|grant| grant.grantee.is_empty())
        .map(|grant| format!("REVOKE {} ON {on} FROM PUBLIC;", grant.privilege));
    grants.chain(revokes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(grantee: &str, privilege: &str) -> Grant {
        Grant { grantee: grantee.into(), privilege: privilege.into(), grantable: false }
    }

    #[test]
    fn only_what_differs_is_granted_or_revoked() {
        let source =
            [grant("", "TEMPORARY"), grant("a b", "CONNECT"), grant("rdsadmin", "CREATE"), grant("us", "CREATE")];
        let target = [grant("", "TEMPORARY"), grant("", "CONNECT"), grant("their own", "CREATE")];
        let statements = differences(&source.into(), &target.into(), "DATABASE x", Some("us"));
        assert_eq!(
            statements,
            ["GRANT CONNECT ON DATABASE x TO \"a b\";", "REVOKE CONNECT ON DATABASE x FROM PUBLIC;"]
        );
    }
}
