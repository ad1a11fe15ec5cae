//! Values: whatever the source prints, the target reads as the same.

use super::case::Case;

const VALUES: &str = include_str!("content/values.sql");
const VALUES_CHANGES: &str = include_str!("content/values_changes.sql");

/// Settings of a role that would change how values print or read, and how long a statement may take.
const HOSTILE_SETTINGS: [(&str, &str); 19] = [
    ("DateStyle", "German, DMY"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "Asia/Kathmandu"),
    ("extra_float_digits", "-2"),
    ("bytea_output", "escape"),
    ("lc_monetary", "C.UTF-8"),
    ("xmloption", "document"),
    ("search_path", "v, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("escape_string_warning", "off"),
    ("statement_timeout", "100ms"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "50ms"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("quote_all_identifiers", "on"),
    ("session_replication_role", "origin"),
    ("row_security", "on"),
];

#[tokio::test]
async fn every_value_arrives_as_it_was() {
    Case::new("values").schema(VALUES).script(VALUES_CHANGES).covering(&[1, 2]).moves().await;
}

#[tokio::test]
async fn the_settings_of_the_role_change_nothing() {
    let case = Case::new("role_settings").schema(VALUES).script(VALUES_CHANGES).covering(&[0]).only_superuser();
    case.role_settings(&HOSTILE_SETTINGS).moves().await;
}
