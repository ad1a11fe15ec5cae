//! What managed services put into databases of theirs: schemas, extensions and roles, each by its exact name.
//!
//! A name is here only if a provider is known to make it: a schema of the user that merely begins alike must travel. What
//! these schemas and extensions hold is of no use elsewhere, and its owner is a role that no other server has. Schemas that a
//! provider makes for its user's data (`neon_auth`, Supabase's `auth` and `storage`) are not here: applications refer to them.
//!
//! Where the names are from: Neon's `compute_tools` (`neon`, `neon_migration`, `cloud_admin`, `neon_superuser`) and manual;
//! Amazon's manual of RDS (`rdsadmin`, `rds_…`); Google's manual of Cloud SQL (`cloudsql…`) and its instances' settings
//! (`google_vacuum_mgmt`); Microsoft's manual of Azure Database (`azure…`).

/// Schemas that never travel; [`super::catalog::IS_USER_TABLE`] has the same ones.
pub const SCHEMAS: [&str; 3] = ["neon", "neon_migration", "google_vacuum_mgmt"];

/// Extensions that a provider brings to look after its servers. Those that hold functions for the user (`aws_s3`,
/// `azure_storage`) are not here: what calls them cannot do without.
pub const EXTENSIONS: [&str; 7] =
    ["neon", "neon_utils", "rds_tools", "rdsutils", "rds_activity_stream", "google_vacuum_mgmt", "azure"];

/// Roles that come with a provider's servers.
pub const ROLES: [&str; 18] = [
    "cloud_admin",
    "neon_superuser",
    "rdsadmin",
    "rdsrepladmin",
    "rds_superuser",
    "rds_replication",
    "rds_iam",
    "rds_password",
    "rds_ad",
    "cloudsqladmin",
    "cloudsqlagent",
    "cloudsqlimportexport",
    "cloudsqlreplica",
    "cloudsqlsuperuser",
    "azure_pg_admin",
    "azure_superuser",
    "azuresu",
    "supabase_admin",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_and_this_list_leave_out_the_same_schemas() {
        let list = SCHEMAS.map(super::super::quote_literal).join(", ");
        assert!(super::super::catalog::IS_USER_TABLE.contains(&list), "{list}");
    }
}
