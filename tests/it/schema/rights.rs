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
    sides.restorer(&archive).before_data(TWO).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn default_privileges_that_the_target_cannot_take_are_left_out() {
    let sides = Sides::with("CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO shop_owner").await;
    sides
        .databases
        .0
        .execute(
            "CREATE ROLE cloud_admin; CREATE ROLE neon_superuser;
             ALTER DEFAULT PRIVILEGES FOR ROLE cloud_admin IN SCHEMA public GRANT ALL ON TABLES TO neon_superuser;
             ALTER DEFAULT PRIVILEGES FOR ROLE rental_owner IN SCHEMA public GRANT SELECT ON TABLES TO shop_reader;
             ALTER DEFAULT PRIVILEGES FOR ROLE shop_owner IN SCHEMA public GRANT SELECT ON TABLES TO shop_reader",
        )
        .await;
    let sides = sides.with_plain_role().await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    restorer.before_data(TWO).await.unwrap();
    restorer.after_data(TWO).await.unwrap();
    let there = "SELECT string_agg(defaclrole::regrole || ' ' || defaclacl::text, ',') FROM pg_default_acl";
    assert_eq!(sides.databases.1.query_string(there).await, "shop_owner {shop_reader=r/shop_owner}");
    let granted = "SELECT coalesce(relacl::text, 'nothing') FROM pg_class WHERE relname = 't'";
    assert_eq!(sides.databases.1.query_string(granted).await, "nothing", "what was restored before them is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn schemas_that_were_there_get_their_owner_comment_and_grants() {
    let sides = Sides::with(
        "ALTER SCHEMA public OWNER TO shop_owner; COMMENT ON SCHEMA public IS 'of the shop';
         GRANT CREATE ON SCHEMA public TO shop_reader;
         CREATE SCHEMA early AUTHORIZATION rental_owner; CREATE TABLE early.t (id int PRIMARY KEY)",
    )
    .await;
    sides.databases.1.execute("CREATE SCHEMA early").await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    restorer.before_data(TWO).await.unwrap();
    restorer.after_data(TWO).await.unwrap();
    let (source, target) = sides.schemas();
    assert!(source.contains("ALTER SCHEMA public OWNER TO shop_owner;"), "{source}");
    assert_equal(&source, &target);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_somebody_else_stops_nothing() {
    let sides = Sides::with(
        "ALTER SCHEMA public OWNER TO shop_owner; COMMENT ON SCHEMA public IS 'of the shop';
         CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO shop_owner",
    )
    .await;
    let sides = sides.with_plain_role().await;
    let archive = dump(sides.request(None)).await.unwrap();
    sides.restorer(&archive).before_data(TWO).await.unwrap();
    let owner = "SELECT relowner::regrole FROM pg_class WHERE relname = 't'";
    assert_eq!(sides.databases.1.query_string(owner).await, "shop_owner");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_trigger_that_is_refused_stays_behind_with_its_comment() {
    let sides = Sides::with(
        "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO shop_owner;
         CREATE FUNCTION log_it() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; ALTER FUNCTION log_it OWNER TO shop_owner;
         CREATE EVENT TRIGGER \"watch it\" ON sql_drop EXECUTE FUNCTION log_it();
         COMMENT ON EVENT TRIGGER \"watch it\" IS 'of the auditors';
         CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'; ALTER FUNCTION touch OWNER TO shop_owner;
         CREATE TRIGGER touched BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION touch();
         COMMENT ON TRIGGER touched ON t IS 'kept'",
    )
    .await;
    let sides = sides.with_plain_role().await;
    let archive = dump(sides.request(None)).await.unwrap();
    let restorer = sides.restorer(&archive);
    restorer.before_data(TWO).await.unwrap();
    restorer.after_data(TWO).await.unwrap();
    restorer.hold_back().await.unwrap();
    let there = "SELECT (SELECT count(*) FROM pg_event_trigger) || ' ' || obj_description(oid, 'pg_trigger')
                 FROM pg_trigger WHERE tgname = 'touched'";
    assert_eq!(sides.databases.1.query_string(there).await, "0 kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_on_the_servers_own_functions_stop_nothing() {
    let sides = Sides::with(
        "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO shop_owner; GRANT SELECT ON t TO shop_reader;
         CREATE ROLE rds_superuser; GRANT EXECUTE ON FUNCTION pg_stat_reset() TO rds_superuser, shop_reader",
    )
    .await;
    let sides = sides.with_plain_role().await;
    let archive = dump(sides.request(None)).await.unwrap();
    sides.restorer(&archive).before_data(TWO).await.unwrap();
    let granted = "SELECT relacl::text FROM pg_class WHERE relname = 't'";
    assert!(sides.databases.1.query_string(granted).await.contains("shop_reader=r/"), "the others arrive");
}
