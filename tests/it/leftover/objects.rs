//! Large objects.

use super::{Sides, number_before};
use crate::harness::{Database, PATIENCE, versions_under_test, wait_until};

/// Odd sizes around the pieces that travel, a hole in the middle and at the end, an empty one, and a large one.
const CONTENT: &str = "
    create table files (id int primary key, content oid);
    create function noise(bytes int, seed int) returns bytea language sql as
        $$ select decode(substr(string_agg(md5(i::text || seed), ''), 1, 2 * bytes), 'hex') from generate_series(0, bytes / 16) i $$;
    select lo_from_bytea(1000 + n, noise(size, n)) from (values (1, 1), (2, 2047), (3, 2049), (4, 1048575), (5, 1048576),
        (6, 1048577), (7, 3000001)) v (n, size);
    select lo_create(1020);
    select lo_from_bytea(1030, 'begins'); select lo_put(1030, 20 * 1024 * 1024 + 3, 'ends');
    select lo_create(1031); select lo_truncate64(lo_open(1031, 393216), 5000000);
    select lo_from_bytea(0, noise(i, i)) from generate_series(1, 250) i;
    comment on large object 1001 is 'it''s small';
    insert into files select row_number() over (), oid from pg_largeobject_metadata";

/// While following and once more right before the cutover; ROUND is its number.
const CHANGES: &str = "
    select lo_put(1007, 1048570 + ROUND, 'across two pieces ROUND'); select lo_put(1030, 7 * 1024 * 1024, 'in the hole ROUND');
    select lo_truncate64(lo_open(1006, 393216), 100000 * ROUND); select lo_put(1020, 10, 'no longer empty ROUND');
    select lo_from_bytea(2000 + ROUND, noise(12345, ROUND)); select lo_unlink(1000 + ROUND);
    select lo_put((select max(oid) from pg_largeobject_metadata), 0, 'changed ROUND')";

/// Everything about each of them.
async fn described(database: &Database) -> Vec<String> {
    database
        .query_strings(
            "select oid || ' ' || md5(lo_get(oid)) || ' ' || length(lo_get(oid)) || ' ' || pg_get_userbyid(lomowner) || ' '
                 || coalesce((select string_agg(a::text, ',' order by a::text) from unnest(lomacl) a), '-') || ' '
                 || coalesce(obj_description(oid, 'pg_largeobject'), '-')
             from pg_largeobject_metadata order by oid",
        )
        .await
}

async fn arrive(sides: Sides, owner: Database, roles: bool) {
    owner.execute(CONTENT).await;
    if roles {
        for server in [&sides.servers.0, &sides.servers.1] {
            server.execute("create role reader; create role \"Odd owner\"; create role other").await;
        }
        owner
            .execute(
                "grant select on large object 1005 to reader, public; grant all on large object 1003 to other with grant option;
                 alter large object 1004 owner to \"Odd owner\"; revoke update on large object 1004 from \"Odd owner\";
                 comment on large object 1004 is 'of another'",
            )
            .await;
    }
    let play = async |round: u32| owner.execute(&CHANGES.replace("ROUND", &round.to_string())).await;
    let mut daemon = sides.pgtandem.spawn(&["run"]);
    daemon.wait_for_log("took the first cut", PATIENCE).await;
    play(1).await;
    daemon.wait_for_log("entering phase follow", PATIENCE).await;

    // Given a cutover that is given up behind the fence, and changes after it,
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));
    let daemon = sides.pgtandem.clone().env("PGTANDEM_CUTOVER_HOOK", "false").spawn(&["run"]);
    sides.follows(&daemon).await;
    let refused = sides.ask("60s").await;
    assert!(refused.code == Some(1) && refused.stderr.contains("hook"), "{refused}\n{}", daemon.stderr());
    assert_eq!(described(&sides.to).await, described(&sides.from).await);
    play(2).await;
    if roles {
        owner
            .execute("revoke select on large object 1005 from public; grant update on large object 1005 to other; comment on large object 1004 is null")
            .await;
    }
    daemon.terminate();
    assert_eq!(daemon.wait(PATIENCE).await.code, Some(0));

    // when the next one happens, everything is there, and it is the source's.
    let daemon = sides.pgtandem.spawn(&["run"]);
    sides.follows(&daemon).await;
    sides.cut_over(daemon).await;
    let ours = described(&sides.from).await;
    assert!(ours.len() > 255, "{}", ours.len());
    assert_eq!(described(&sides.to).await, ours);
    // Behind the fence only what had changed travelled, which was little.
    let rest = sides.detail("rest").await;
    assert!(rest == "nothing differed" || number_before(&rest, " bytes") < 2_000_000, "{rest}");
    // A hole is no rows.
    let pages = "select count(*) from pg_largeobject where loid = 1030";
    assert!(sides.to.query_string(pages).await.parse::<u32>().unwrap() < 2000, "a hole was filled with zeroes");
    sides.same().await;
}

#[tokio::test]
async fn large_objects_arrive_with_owner_grants_and_comment() {
    let sides = Sides::new(versions_under_test()).await;
    let owner = sides.from.clone();
    arrive(sides, owner, true).await;
}

#[tokio::test]
async fn large_objects_arrive_from_13_to_18() {
    let sides = Sides::new((13, 18)).await;
    let owner = sides.from.clone();
    arrive(sides, owner, true).await;
}

#[tokio::test]
async fn large_objects_arrive_without_a_superuser() {
    let sides = Sides::without_a_superuser(versions_under_test()).await;
    let owner = sides.as_owner();
    arrive(sides, owner, false).await;
}

/// 50 MB, of which a little changes again and again until the fence stops it.
#[tokio::test]
async fn a_great_object_that_changes_until_the_fence_arrives() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute(CONTENT).await;
    sides
        .from
        .execute("select lo_create(77); select lo_put(77, i * 5000000::int8, noise(5000000, i)) from generate_series(0, 9) i; select lo_put(77, 50000000, 'odd')")
        .await;
    let daemon = sides.following().await;
    let writer = sides.from.connect().await;
    // The row tells the writer when it is over: a large object alone can be written to after the switch.
    let writing = tokio::spawn(async move {
        let mut rounds = 0;
        while writer
            .batch_execute(&format!(
                "select lo_put(77, 31000000 + {rounds}, 'x'); update files set id = id where id = 1"
            ))
            .await
            .is_ok()
        {
            rounds += 1;
        }
        rounds
    });
    sides.cut_over(daemon).await;
    assert!(writing.await.expect("the writer ends") > 0, "nothing was written meanwhile");
    assert_eq!(described(&sides.to).await, described(&sides.from).await);
    let (ahead, rest) = (sides.detail("carry").await, sides.detail("rest").await);
    assert!(number_before(&ahead, " bytes") > 50_000_000, "{ahead}");
    assert!(rest == "nothing differed" || number_before(&rest, " bytes") < 5_000_000, "{rest}");
}

/// What stands on the target under the same identifier and is not ours is never touched.
#[tokio::test]
async fn an_object_of_somebody_else_refuses_the_cutover_by_name() {
    let sides = Sides::new(versions_under_test()).await;
    sides
        .from
        .execute("create table t (id int primary key); select lo_from_bytea(4711, 'ours'); select lo_create(4713)")
        .await;
    let daemon = sides.following().await;
    sides.to.execute("select lo_from_bytea(4711, 'theirs'); select lo_from_bytea(4712, 'theirs too')").await;
    let refused = sides.ask("20s").await;
    assert!(refused.code == Some(1) && refused.stderr.contains("large object 4711"), "{refused}");
    assert_eq!(sides.to.query_string("select convert_from(lo_get(4711), 'UTF8')").await, "theirs");
    sides.to.execute("select lo_unlink(4711)").await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string("select convert_from(lo_get(4711), 'UTF8')").await, "ours");
    assert_eq!(sides.to.query_string("select convert_from(lo_get(4712), 'UTF8')").await, "theirs too");
}

#[tokio::test]
async fn large_objects_stay_where_the_configuration_says_so() {
    let sides = Sides::new(versions_under_test()).await.configured("[move]\nlarge_objects = false");
    sides.from.execute("create table t (id int primary key); select lo_from_bytea(4711, 'ours')").await;
    let daemon = sides.following().await;
    sides.cut_over(daemon).await;
    assert_eq!(sides.to.query_string("select count(*) from pg_largeobject_metadata").await, "0");
}

/// The daemon dies while a great object is on its way.
#[tokio::test]
async fn a_death_while_an_object_travels_leaves_no_half_of_it() {
    let sides = Sides::new(versions_under_test()).await;
    sides.from.execute(CONTENT).await;
    let daemon = sides.following().await;
    let holder = sides.to.connect().await;
    // Given a target that keeps the object waiting,
    holder.batch_execute("begin; lock table pgtandem.large_object in share mode").await.unwrap();
    let asking = sides.pgtandem.spawn(&["cutover", "--timeout", "60s"]);
    sides.wait_for_step("carry").await;
    wait_until("it waits", PATIENCE, async || {
        let waits = "select count(*) > 0 from pg_stat_activity where application_name = 'pgtandem app carry' and wait_event_type = 'Lock'";
        sides.to.query_string(waits).await == "t"
    })
    .await;
    // when the daemon dies, then nothing of it is there, and the next one brings it whole.
    daemon.kill();
    assert_eq!(sides.to.query_string("select count(*) from pg_largeobject_metadata").await, "0");
    holder.batch_execute("rollback").await.unwrap();
    let daemon = sides.pgtandem.spawn(&["run"]);
    let answer = asking.wait(PATIENCE).await;
    assert_eq!(answer.code, Some(1), "{answer}");
    sides.follows(&daemon).await;
    sides.cut_over(daemon).await;
    assert_eq!(described(&sides.to).await, described(&sides.from).await);
}

/// Whoever copies by hand, as `snapshot` says, has copied the large objects as well.
#[tokio::test]
async fn objects_that_were_copied_by_hand_are_the_moves_own() {
    let sides = Sides::new(versions_under_test()).await;
    sides
        .from
        .execute("create table t (id int primary key); select lo_from_bytea(4711, 'before'), lo_create(4712)")
        .await;
    sides
        .to
        .execute("create table t (id int primary key); select lo_from_bytea(4711, 'before'), lo_create(4712)")
        .await;
    // The daemon would say so before it began, were they not part of a copy.
    let checked = sides.pgtandem.run(&["check"]).await;
    assert!(checked.stdout.contains("SELECT lo_unlink(4711);"), "{checked}");
    let sides = sides.configured("[copy]\nmethod = 'none'");
    sides.to.execute("drop table t").await;
    let mut holding = sides.pgtandem.spawn(&["snapshot"]);
    wait_until("the snapshot is printed", PATIENCE, async || holding.stdout().contains("snapshot ")).await;
    assert!(holding.is_running());
    holding.terminate();
    sides.to.execute("create table t (id int primary key)").await;
    let daemon = sides.following().await;
    sides.from.execute("select lo_put(4711, 0, 'after!'), lo_unlink(4712)").await;
    sides.cut_over(daemon).await;
    assert_eq!(described(&sides.to).await, described(&sides.from).await);
}

/// Rights are asked for before the move.
#[tokio::test]
async fn objects_that_cannot_be_read_or_made_block_the_move() {
    let sides = Sides::without_a_superuser(versions_under_test()).await;
    sides.as_owner().execute("create table t (id int primary key); select lo_create(1)").await;
    sides.from.execute("select lo_create(2); select lo_create(3)").await;
    sides.servers.0.execute("create role stranger").await;
    sides.from.execute("alter large object 3 owner to stranger").await;
    let checked = sides.pgtandem.run(&["check", "--json"]).await;
    assert_eq!(checked.code, Some(1), "{checked}");
    for part in ["large_objects_unreadable", "GRANT SELECT ON LARGE OBJECT 2 TO", "roles_missing", "stranger"] {
        assert!(checked.stdout.contains(part), "no {part}: {checked}");
    }
    let without = sides.pgtandem.clone().env("PGTANDEM_MOVE_LARGE_OBJECTS", "false").run(&["check"]).await;
    assert_eq!(without.code, Some(0), "{without}");
}
