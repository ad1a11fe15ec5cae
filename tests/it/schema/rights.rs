//! What belongs to a provider, or what the target's role may not restore, is left out by name, and nothing else is.

use super::*;
use crate::harness::PASSWORD;

impl Sides {
    /// The target from the view of a role without a superuser's rights, whose state this is from now on.
    async fn with_plain_role(mut self) -> Self {
        let (cluster, database) = (&self.clusters.1, &self.databases.1);
        self.store.remove().await.unwrap();
        cluster.execute(&format!("CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'; GRANT shop_owner TO plain")).await;
        database
            .execute(
                "GRANT CREATE ON DATABASE app TO plain; GRANT CREATE ON DATABASE app TO shop_owner;
                 GRANT CREATE ON SCHEMA public TO plain, shop_owner",
            )
            .await;
        self.target = server(Side::Target, &database.with_user("plain", PASSWORD));
        self.store = Store::new(self.target.clone(), MoveName::new("app").unwrap());
        self.store.install(&serde_json::json!({})).await.unwrap();
        self
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_named_almost_like_a_providers_travels() {
    let sides = Sides::with(
        "CREATE SCHEMA rds_reports; CREATE TABLE rds_reports.t (id int PRIMARY KEY);
         CREATE SCHEMA neon_auth; CREATE TABLE neon_auth.users (id int PRIMARY KEY);
         CREATE SCHEMA azure; CREATE TABLE azure.t (id int PRIMARY KEY);
         CREATE SCHEMA neon; CREATE TABLE neon.theirs (id int PRIMARY KEY)",
    )
    .await;
    let archive = dump(sides.request(None)).await.unwrap();
    sides.restorer(&archive).before_data().await.unwrap();
    let there = "SELECT string_agg(relnamespace::regnamespace || '.' || relname, ' ' ORDER BY 1)
                 FROM pg_class WHERE relkind = 'r' AND relname IN ('t', 'users', 'theirs')";
    let there: Vec<_> = sides.databases.1.query_string(there).await.split(' ').map(str::to_owned).collect();
    let tables: Vec<_> = sides.tables().await.iter().map(|table| table.name.plain()).collect();
    for expected in ["azure.t", "neon_auth.users", "rds_reports.t"] {
        assert!(there.iter().any(|table| table == expected), "{expected} is not in {there:?}");
        assert!(tables.iter().any(|table| table == expected), "{expected} is not in {tables:?}");
    }
    assert_eq!((there.len(), tables.len()), (3, 3), "{there:?} {tables:?}");
}
