//! Rows and identity: each change finds its row, and no other.

use super::case::{Case, Moved};

const SHAPES: &str = include_str!("content/shapes.sql");
const SHAPES_CHANGES: &str = include_str!("content/shapes_changes.sql");

/// The longest name that there is, in bytes.
fn shapes(sql: &str) -> String {
    sql.replace("LONGNAME", &("ä".repeat(31) + "1"))
}

/// Foreign keys wait for the cutover and triggers are disabled one by one, where the role is no superuser.
#[tokio::test]
async fn every_shape_of_table_is_followed() {
    let case = Case::new("shapes").schema(&shapes(SHAPES)).script(&shapes(SHAPES_CHANGES)).covering(&[0, 1, 4]);
    case.owner_may("bypassrls").moves_and(async |moved| the_target_works_alone(moved).await).await;
}

/// What was held back is in force: triggers and rules of every state, foreign keys, GENERATED ALWAYS.
async fn the_target_works_alone(moved: &Moved) {
    let to = &moved.to;
    let seen = "select coalesce(max(id), 0) from witness";
    let before = to.query_string(seen).await;
    to.execute("insert into watched values (-1, 'target'); insert into ruled values (-1, 'target'); update ruled set v = 'x' where id = -1")
        .await;
    let fired = to.query_strings(&format!("select what from witness where id > {before} order by what")).await;
    assert_eq!(fired, ["always INSERT", "late INSERT", "plain INSERT", "rule", "rule always"]);
    let keys = "select count(*) || ' ' || bool_and(convalidated) from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace";
    assert_eq!(to.query_string(keys).await, "4 true");
    let client = to.connect().await;
    for refused in
        ["insert into child values (-1, -1)", "insert into always values (-1000)", "update always set id = 5"]
    {
        assert!(client.batch_execute(refused).await.is_err(), "{refused} was accepted");
    }
}
