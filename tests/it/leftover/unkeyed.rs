//! Tables without a replica identity, under each choice of `follow.without_identity`.

use super::{Sides, number_before};
use crate::harness::{Database, PATIENCE, versions_under_test, wait_until};

/// Duplicates, NULLs, types without equality, a deferrable key, partitions.
const CONTENT: &str = "
    create table log (v text, n int); create table typed (j json, p point, x xml, t timestamptz default '2026-01-01');
    create table late_key (id int primary key deferrable, v text);
    create table parts (k int, v text) partition by hash (k);
    create table parts_0 partition of parts for values with (modulus 2, remainder 0);
    create table parts_1 partition of parts for values with (modulus 2, remainder 1);
    create table keyed (id int primary key, v text);
    insert into log select case when i % 4 > 0 then 'row' end, nullif(i % 7, 0) from generate_series(1, 2000) i;
    insert into typed (j, p, x) values ('{\"a\": 1}', '(1,2)', '<a/>'), ('{\"a\": 1}', '(1,2)', '<a/>'), (null, null, null);
    insert into late_key select i, 'v' from generate_series(1, 100) i; insert into parts select i, 'v' from generate_series(1, 100) i;
    insert into keyed select i, 'v' from generate_series(1, 100) i";

const CHANGES: &str = "
    insert into log values ('row', 1), ('row', 1), (null, null), ('ROUND', ROUND); update log set v = 'u ROUND' where n = ROUND;
    delete from log where ctid in (select ctid from log where v = 'row' limit 5);
    update typed set p = point(ROUND, ROUND) where p is not null; insert into typed (x) values ('<r>ROUND</r>');
    update late_key set v = 'ROUND' where id % 10 = ROUND; delete from late_key where id = 50 + ROUND; insert into late_key values (1000 + ROUND, 'new');
    update parts set v = 'ROUND', k = k + 1000 where k % 17 = ROUND; insert into parts values (5000 + ROUND, null);
    update keyed set v = 'ROUND' where id % 3 = 0; insert into keyed values (1000 + ROUND, 'x')";

const IDENTITIES: &str = "select string_agg(relname || relreplident::text, ' ' order by relname) from pg_class
    where relkind = 'r' and relnamespace = 'public'::regnamespace";

async fn arrive(sides: Sides, owner: Database) -> Sides {
    owner.execute(CONTENT).await;
    let before = sides.from.query_string(IDENTITIES).await;
    let play = async |round: u32| owner.execute(&CHANGES.replace("ROUND", &round.to_string())).await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("took the first cut", PATIENCE).await;
    play(1).await;
    daemon.wait_for_log("entering phase follow", PATIENCE).await;
    play(2).await;
    // A cutover that is given up after the difference was carried: what the source writes next comes once, on top.
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    let daemon = sides.pgtandem.clone().env("PGTANDEM_CUTOVER_HOOK", "false").spawn(&["run"]);
    sides.follows(&daemon).await;
    let refused = sides.ask("60s").await;
    assert!(refused.code == Some(1) && refused.stderr.contains("hook"), "{refused}\n{}", daemon.stderr());
    sides.same().await;
    owner.execute("insert into log select 'after', i from generate_series(1, 500) i").await;
    wait_until("the rows arrive", PATIENCE, async || {
        sides.to.query_string("select count(*) from log where v = 'after'").await == "500"
    })
    .await;
    play(3).await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));

    let daemon = sides.pgtandem.spawn(&["run"]);
    sides.follows(&daemon).await;
    play(4).await;
    sides.cut_over(daemon).await;
    sides.same().await;

    let cleaned = sides.pgtandem.run(&["clean", "--yes"]).await;
    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    assert_eq!(sides.from.query_string(IDENTITIES).await, before);
    sides
}

/// Behind the fence, because the stream brings their inserts.
#[tokio::test]
async fn differences_are_copied_behind_the_fence() {
    let sides = Sides::new(versions_under_test())
        .await
        .configured("[follow]\nwithout_identity = 'copy'\n[cutover]\nverify = 'full'");
    let owner = sides.from.clone();
    arrive(sides, owner).await;
}

#[tokio::test]
async fn differences_are_copied_without_a_superuser_from_13_to_18() {
    let sides = Sides::without_a_superuser((13, 18)).await.configured("[follow]\nwithout_identity = 'copy'");
    let owner = sides.as_owner();
    arrive(sides, owner).await;
}

#[tokio::test]
async fn tables_are_given_an_identity_and_get_their_own_back() {
    let sides =
        Sides::without_a_superuser(versions_under_test()).await.configured("[follow]\nwithout_identity = 'full'");
    let owner = sides.as_owner();
    arrive(sides, owner).await;
}

/// The choice is not only for a new move: it opens the way for one that an update has blocked.
#[tokio::test]
async fn a_move_that_an_update_has_blocked_goes_on_with_another_choice() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute("create table log (v text); insert into log select i from generate_series(1, 100) i").await;
    let mut daemon = sides.following().await;
    sides.from.execute("update log set v = 'x' where v = '7'; insert into log values ('y')").await;
    daemon.wait_for_log("code=\"unkeyed_changed\"", PATIENCE).await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));

    let sides = sides.configured("[follow]\nwithout_identity = 'copy'");
    let daemon = sides.pgtandem.spawn(&["run"]);
    sides.follows(&daemon).await;
    let printed = sides.cut_over(daemon).await;
    assert!(number_before(&printed, " rows of 1 tables") > 0, "{printed}");
    sides.same().await;
}

/// What was noted of it under another choice must not block a table for good that is followed like others by now.
#[tokio::test]
async fn a_table_that_is_copied_again_under_full_is_not_watched_any_more() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute("create table log (v text); insert into log select i from generate_series(1, 100) i").await;
    let mut daemon = sides.following().await;
    sides.from.execute("update log set v = 'x' where v = '7'").await;
    daemon.wait_for_log("code=\"unkeyed_changed\"", PATIENCE).await;
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));

    let sides = sides.configured("[follow]\nwithout_identity = 'full'");
    let noted = sides.pgtandem.run(&["resync", "log"]).await;
    assert_eq!(noted.code, Some(0), "{noted}");
    let daemon = sides.following().await;
    assert_eq!(sides.from.query_string(IDENTITIES).await, "logf");
    assert_eq!(sides.to.query_string("select count(*) from pgtandem.unkeyed_table").await, "0");
    sides.from.execute("update log set v = 'y' where v = '8'; delete from log where v = '9'").await;
    sides.cut_over(daemon).await;
    sides.same().await;
}

/// The stream brings the table, and nothing that would tell which of its rows an update meant.
#[tokio::test]
async fn a_new_table_without_a_key_is_given_an_identity_under_full() {
    let sides = Sides::new(versions_under_test())
        .await
        .configured("[follow]\nwithout_identity = 'full'\n[cutover]\nverify = 'full'");
    sides.from.execute("create table t (id int primary key)").await;
    let daemon = sides.following().await;
    sides
        .from
        .execute(
            "create table fresh (v text, n int); insert into fresh select 'row', i % 3 from generate_series(1, 50) i",
        )
        .await;
    sides.from.execute("update fresh set v = 'changed' where n = 1").await;
    wait_until("the table is identified", PATIENCE, async || sides.from.query_string(IDENTITIES).await == "freshf td")
        .await;
    sides.from.execute("update fresh set v = 'again' where n = 1; delete from fresh where n = 2").await;
    let arrived = "select count(*) filter (where v = 'again') || ' of ' || count(*) from fresh";
    let expected = sides.from.query_string(arrived).await;
    wait_until("the changes arrive", PATIENCE, async || {
        // The target has the table as soon as the stream brings it.
        sides.to.query_string("select to_regclass('fresh') is not null").await == "t"
            && sides.to.query_string(arrived).await == expected
    })
    .await;
    sides.follows(&daemon).await;
    sides.cut_over(daemon).await;
    sides.same().await;
}

/// Whatever the owner did to the tables since then, `clean` ends, and says what stays as it is.
#[tokio::test]
async fn clean_brings_back_identities_under_other_names_and_says_which_it_cannot() {
    let sides = Sides::without_a_superuser((16, 17)).await.configured("[follow]\nwithout_identity = 'full'");
    sides
        .as_owner()
        .execute(
            "create table named (v text); create table taken (v text);
             create table indexed (a int, g int not null generated always as (a * 2) stored unique);
             alter table indexed replica identity using index indexed_g_key",
        )
        .await;
    let copied = sides.pgtandem.run(&["run", "--until", "follow"]).await;
    assert_eq!(copied.code, Some(0), "{copied}");
    assert_eq!(sides.from.query_string(IDENTITIES).await, "indexedf namedf takenf");

    sides
        .as_owner()
        .execute("alter table named rename to renamed; alter table indexed drop constraint indexed_g_key")
        .await;
    sides.from.execute("alter table taken owner to postgres").await;
    let cleaned = sides.pgtandem.run(&["clean", "--yes"]).await;

    assert_eq!(cleaned.code, Some(0), "{cleaned}");
    assert!(cleaned.stdout.contains("brought back the replica identity of 1 tables"), "{cleaned}");
    for kept in ["table public.indexed keeps REPLICA IDENTITY FULL", "table public.taken keeps REPLICA IDENTITY FULL"] {
        assert!(cleaned.stderr.contains(kept), "{cleaned}");
    }
    assert_eq!(sides.from.query_string(IDENTITIES).await, "indexedf renamedd takenf");
    assert_eq!(sides.to.query_string("select count(*) from pg_namespace where nspname = 'pgtandem'").await, "0");
}
